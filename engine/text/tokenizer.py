"""Text to token ids and back: a thin wrapper over the model folder's own tokenizer and chat template.

transformers reads the files, from the folder alone and never from the network; it is imported on load, so that
importing this module costs nothing. Encoding and decoding then go straight to the Rust tokenizer, which threads share.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from kvbaton.engine.gguf_file import GgufFile, find_gguf
from kvbaton.engine.request import InvalidRequest
from kvbaton.engine.text.detokenizer import ByteDetokenizer, IncrementalDetokenizer, PieceDetokenizer, unicode_to_bytes
from kvbaton.engine.text.gguf_tokenizer import read_gguf_tokenizer
from kvbaton.settings import ConfigError

_RUST_FILE = "tokenizer.json"
_TOKENIZER_FILES = (_RUST_FILE, "tokenizer.model", "vocab.json")


def check_tokenizer(folder: Path) -> None:
    """Raise `ConfigError` when a model's tokenizer is missing, damaged, or of a kind that nothing here converts.

    Takes the seconds of a load only where there is no tokenizer.json.
    """
    if find_gguf(folder) is not None:
        Tokenizer.load(folder)
        return
    _check_present(folder)
    path = folder / _RUST_FILE
    if not path.exists():
        Tokenizer.load(folder)
        return
    from tokenizers import Tokenizer as RustTokenizer

    try:
        RustTokenizer.from_file(str(path))
    except Exception as error:  # plain Exception is what it raises for a damaged file
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _check_present(folder: Path) -> None:
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ConfigError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there")


class Tokenizer:
    """Immutable once loaded; safe to share between threads."""

    def __init__(self, hf: Any) -> None:
        """`hf` is a transformers tokenizer with a Rust backend.

        Truncation and padding that its file asks for belong to batches of training: a prompt is encoded as it is.
        """
        self._hf = hf
        self._rust = hf.backend_tokenizer
        self._rust.no_truncation()
        self._rust.no_padding()
        self._special = frozenset(hf.all_special_ids) | {
            index for index, token in self._rust.get_added_tokens_decoder().items() if token.special
        }
        steps = _decoder_steps(self._rust)
        self._byte_level = steps == ["ByteLevel"]
        self._byte_of = _byte_tokens(self._rust) if "ByteFallback" in steps else {}

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder or a GGUF file; raises `ConfigError` naming what is missing or damaged."""
        gguf = find_gguf(folder)
        if gguf is not None:
            return cls(read_gguf_tokenizer(GgufFile.open(gguf)))
        if not folder.is_dir():
            raise ConfigError(f"model folder {folder} does not exist or is not a folder")
        _check_present(folder)
        hf = _read(folder)
        if getattr(hf, "backend_tokenizer", None) is None:
            raise ConfigError(f"{folder}: {type(hf).__name__} is not supported; a tokenizer.json is needed")
        return cls(hf)

    @property
    def eos_id(self) -> int | None:
        """The id of `eos_token`, where the tokenizer names one."""
        token: int | None = self._hf.eos_token_id
        return token

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Special tokens in `text` become their ids; `add_special_tokens` adds those that start every prompt (BOS)."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """For each token of `encode`, where its part of `text` begins: behind the parts of the tokens before it."""
        encoding = self._rust.encode(text, add_special_tokens=add_special_tokens)
        spans, nexts = encoding.offsets, [*encoding.offsets[1:], (-1, -1)]
        # A space that the tokenizer puts before a word is no part of the text, but has the span of what follows.
        ends = [
            first if piece == "▁" and first == after else end
            for piece, (first, end), (after, _) in zip(encoding.tokens, spans, nexts, strict=False)
        ]
        return [0, *accumulate(ends, max)][: len(ends)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Incomplete characters become U+FFFD; ids without a token become nothing."""
        text: str = self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """One token alone, special ones by name; U+FFFD where it is a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        if self._byte_level:
            return unicode_to_bytes(self._rust.id_to_token(token_id) or "")
        byte = self._byte_of.get(token_id)
        if byte is not None:
            return bytes([byte])
        return (self._rust.id_to_token(token_id) or "").replace("▁", " ").encode()

    def detokenizer(
        self, prompt: Sequence[int] = (), skip_special_tokens: bool = True, shown: Collection[str] = ()
    ) -> IncrementalDetokenizer:
        """A fresh stream for the tokens that follow `prompt`. Special tokens in `shown` are not skipped."""
        skipped = self._special if skip_special_tokens else frozenset[int]()
        if skipped and shown:
            skipped = skipped.difference(map(self._rust.token_to_id, shown))
        if self._byte_level:
            return ByteDetokenizer(self._rust.id_to_token, skipped)
        return PieceDetokenizer(self._decode_all, self._byte_of.get, skipped, prompt)

    def _decode_all(self, token_ids: list[int]) -> str:
        return self.decode(token_ids, skip_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; raises `InvalidRequest` where the template is absent or refuses it."""
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template (tokenizer_config.json or chat_template.jinja); use /v1/completions",
                "messages",
            )
        if not messages:
            raise InvalidRequest("messages is empty", "messages")
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] if tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(template_options or {}),
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", "messages") from error
        return text


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizer raises plain Exception for a damaged file
        if (folder / _RUST_FILE).exists():
            raise ConfigError(f"{folder}: the tokenizer cannot be read: {error}") from error
        remedy = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        raise ConfigError(
            f"{folder} has no {_RUST_FILE}, and its tokenizer cannot be converted here ({error}). Save one where it "
            f"can, for example with sentencepiece installed: {remedy}"
        ) from error


def _decoder_steps(rust: Any) -> list[str]:
    decoder = json.loads(rust.to_str()).get("decoder") or {}
    return [step.get("type") for step in decoder.get("decoders", [decoder])]


def _byte_tokens(rust: Any) -> dict[int, int]:
    """The byte of each byte-fallback token, by its id."""
    ids = {byte: rust.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {token_id: byte for byte, token_id in ids.items() if token_id is not None}
