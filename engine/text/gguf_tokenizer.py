"""The tokenizer that a GGUF file describes: vocabulary, merges or scores, special tokens and chat template.

Two kinds are read. `gpt2` is byte-level BPE; how it splits text before the merges is known by a name alone, and a name
that is not in `_SPLITS` is refused, since a wrong split costs quality without an error. `llama` is SentencePiece's BPE:
the merges follow from the scores, and what the vocabulary lacks is spelled in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kvbaton.engine.gguf_file import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_GPT2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_RULE = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_RULE = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_RULE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How text is cut before the merges. `whole_words`: a piece that is a token is one, whatever the merges say."""

    rule: str
    single_digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    bos: bool = False  # where the file does not say


_GPT2, _DIGITS = _Split(_GPT2_RULE), _Split(_GPT2_RULE, single_digits=True)
_LLAMA3, _QWEN2 = _Split(_LLAMA3_RULE, whole_words=True, bos=True), _Split(_QWEN2_RULE, nfc=True)
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Split(_TEKKEN_RULE, whole_words=True, bos=True),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """`kinds` has one number a token, by which llama.cpp tells control tokens and such from text."""

    tokens: list[str]
    kinds: list[int]

    @property
    def ids(self) -> dict[str, int]:
        pairs = zip(self.tokens, self.kinds, strict=True)
        return {token: index for index, (token, kind) in enumerate(pairs) if kind != _UNUSED}

    def token(self, index: int | None) -> str | None:
        return self.tokens[index] if index is not None and 0 <= index < len(self.tokens) else None


def read_gguf_tokenizer(file: GgufFile) -> Any:
    """A transformers tokenizer with a Rust backend; raises `ConfigError` naming what is missing or not supported."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = _vocabulary(file)
    kind = file.string("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise file.error(f"tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    rust = _byte_level(file, vocabulary) if kind == "gpt2" else _sentencepiece(file, vocabulary)
    special = {
        name: vocabulary.token(file.optional_integer(f"tokenizer.ggml.{key}_token_id"))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _add_tokens(rust, vocabulary)
    bos = special["bos"] if file.flag("tokenizer.ggml.add_bos_token", _adds_bos(file, kind)) else None
    eos = special["eos"] if file.flag("tokenizer.ggml.add_eos_token", False) else None
    _surround(rust, bos, eos)
    names = {f"{name}_token": token for name, token in special.items() if token is not None}
    template = file.optional_string("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=rust, chat_template=template, clean_up_tokenization_spaces=False, **names
    )


def _vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.array("tokenizer.ggml.tokens")
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise file.error("tokenizer.ggml.tokens, the vocabulary, is missing or not a list of texts")
    kinds = file.array("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise file.error(f"tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens")
    return _Vocabulary(tokens, kinds)


def _adds_bos(file: GgufFile, kind: str) -> bool:
    return kind == "llama" or _split(file).bos


def _split(file: GgufFile) -> _Split:
    name = file.optional_string("tokenizer.ggml.pre") or "default"
    if name not in _SPLITS:
        raise file.error(f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(_SPLITS)}")
    return _SPLITS[name]


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    split, ids = _split(file), vocabulary.ids
    merges = [tuple(merge.split(" ")) for merge in file.array("tokenizer.ggml.merges") or ()]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise file.error("tokenizer.ggml.merges is missing or not a list of pairs")
    rust = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=split.whole_words))
    if split.nfc:
        rust.normalizer = normalizers.NFC()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split.single_digits else []
    rule = pre_tokenizers.Split(Regex(split.rule), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.pre_tokenizer = pre_tokenizers.Sequence([*digits, rule, to_bytes])
    rust.decoder = decoders.ByteLevel()
    return rust


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    scores = file.array("tokenizer.ggml.scores")
    if not scores or len(scores) != len(vocabulary.tokens):
        raise file.error("tokenizer.ggml.scores is missing or has not one score a token")
    unknown = vocabulary.token(file.optional_integer("tokenizer.ggml.unknown_token_id"))
    ids = vocabulary.ids
    merges = merges_of(list(ids), [scores[index] for index in ids.values()])
    model = models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    rust = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    blanks = normalizers.Replace(" ", "▁")
    if file.flag("tokenizer.ggml.add_space_prefix", True):
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        steps.append(decoders.Strip(" ", left=1, right=0))
    else:
        rust.normalizer = blanks
    rust.decoder = decoders.Sequence(steps)
    return rust


def merges_of(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, the best score first, as transformers converts SentencePiece models."""
    known = frozenset(tokens)
    found = sorted(
        (-score, -cut, cut - len(token), index)
        for index, (token, score) in enumerate(zip(tokens, scores, strict=True))
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    )
    return [(tokens[index][:-minus_cut], tokens[index][-minus_cut:]) for _, minus_cut, _, index in found]


def _add_tokens(rust: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Control tokens and those defined by users are found whole in a text, before anything else is done to it."""
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind == _USER_DEFINED:
            rust.add_tokens([AddedToken(token, normalized=False, special=False)])
        elif kind in (_CONTROL, _UNKNOWN):
            rust.add_special_tokens([AddedToken(token, normalized=False, special=True)])


def _surround(rust: Tokenizer, bos: str | None, eos: str | None) -> None:
    tokens = [token for token in (bos, eos) if token is not None]
    if tokens:
        parts = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ids = [(token, rust.token_to_id(token)) for token in tokens]
        rust.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ids)
