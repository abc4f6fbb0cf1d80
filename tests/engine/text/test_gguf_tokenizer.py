"""The tokenizer of a GGUF file gives the ids and texts of the tokenizer that the file was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from kvbaton.engine.gguf_file import GgufFile
from kvbaton.engine.text.gguf_tokenizer import merges_of, read_gguf_tokenizer
from kvbaton.engine.text.tokenizer import Tokenizer, check_tokenizer
from kvbaton.settings import ConfigError
from support.gguf_files import write_gguf
from support.oracle import TinyModels

TEXTS = (
    "",
    "the harbour, 1234 waves",
    "  two  blanks\n\n\ttab ",
    "it's They'LL naïve 東京 🙂🏽‍🚀",
    "<|im_start|>user\nhi<|im_end|>",
)
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁", "t", "h", "e", "s", "a", "▁t", "he", "▁the", "▁s", "ea", "▁sea", "<pad0>", "[tool]"]
SCORES = [-10.0, -11.0, -12.0, -13.0, -14.0, -15.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModels) -> Path:
    return tiny_model("llama")


def test_byte_level_kind(folder: Path, tmp_path: Path) -> None:
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", tokenizer__ggml__add_bos_token=True)
    mine, theirs = Tokenizer.load(path), Tokenizer.load(folder)
    messages = [{"role": "user", "content": "Good night, says the town."}]
    assert mine.render_chat(messages) == theirs.render_chat(messages)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert mine.encode(text) == ids
        for skip in (True, False):
            assert mine.decode(ids, skip) == theirs.decode(ids, skip)
        stream = mine.detokenizer(skip_special_tokens=False)
        assert "".join([*(stream.push(token) for token in ids), stream.flush()]) == theirs.decode(ids, False)


def test_bos_is_added_where_the_file_says_so(folder: Path, tmp_path: Path) -> None:
    plain = Tokenizer.load(write_gguf(folder, tmp_path / "a.gguf", "llama")).encode("sea")
    changes = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}
    ids = Tokenizer.load(write_gguf(folder, tmp_path / "b.gguf", "llama", **changes)).encode("sea")
    assert ids[1:-1] == plain
    assert [Tokenizer.load(folder).token_text(token) for token in (ids[0], ids[-1])] == ["<|bos|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["ab", " 1234", "'s", " ", " x"]),
        ("smollm", ["ab", " ", "1", "2", "3", "4", "'s", " ", " x"]),
        ("llama-bpe", ["ab", " ", "123", "4", "'s", " ", " x"]),
        ("qwen2", ["ab", " ", "1", "2", "3", "4", "'s", " ", " x"]),
    ],
)
def test_text_is_split_as_the_name_says(name: str, pieces: list[str], folder: Path, tmp_path: Path) -> None:
    """Guards quality: a wrong split gives ids that the model has never seen together."""
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", tokenizer__ggml__pre=name)
    backend = read_gguf_tokenizer(GgufFile.open(path)).backend_tokenizer
    found = [piece.replace("Ġ", " ") for piece, _ in backend.pre_tokenizer.pre_tokenize_str("ab 1234's  x")]
    assert found == pieces


def _sentencepiece(path: Path, **changes: Any) -> Path:
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) - 2), 5, 4]
    writer = GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", PIECES + WORDS)
    writer.add_array("tokenizer.ggml.scores", [0.0] * len(PIECES) + SCORES)
    writer.add_array("tokenizer.ggml.token_type", kinds)
    for index, name in enumerate(("unknown", "bos", "eos")):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for key, value in changes.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.add_tensor("one", np.zeros(1, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_sentencepiece_kind(tmp_path: Path) -> None:
    """Guards merges made of scores, a blank before the first word, and bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer.load(_sentencepiece(tmp_path / "m.gguf"))
    named = [(PIECES + WORDS)[token] for token in tokenizer.encode("the sea")]
    assert named == ["<s>", "▁the", "▁sea"]
    smile = [(PIECES + WORDS)[token] for token in tokenizer.encode("☺", add_special_tokens=False)]
    assert smile == ["▁", "<0xE2>", "<0x98>", "<0xBA>"]
    for text in ("the sea", "☺ the☺", " sea", "the[tool]sea"):
        assert tokenizer.decode(tokenizer.encode(text)) in (text, text.replace("]", "] "))
    assert [(PIECES + WORDS)[token] for token in tokenizer.encode("[tool]")] == ["<s>", "[tool]"]
    assert "<pad0>" not in [tokenizer.token_text(token) for token in tokenizer.encode("<pad0>")]


def test_sentencepiece_without_a_blank_and_bos(tmp_path: Path) -> None:
    path = _sentencepiece(tmp_path / "m.gguf", add_space_prefix=False, add_bos_token=False)
    ids = Tokenizer.load(path).encode("the sea")
    assert [(PIECES + WORDS)[token] for token in ids] == ["t", "he", "▁sea"]


def test_merges_are_those_of_transformers(tmp_path: Path) -> None:
    """Guards the order among equal scores."""
    from transformers.tokenization_utils_base import generate_merges

    tokens = [*WORDS[:12], "hes", "ese", "▁se", "sea"]
    scores = [*SCORES[:12], -2.0, -2.0, -4.0, -4.0]
    ids = {token: index for index, token in enumerate(tokens)}
    assert merges_of(tokens, scores) == generate_merges(ids, dict(zip(tokens, scores, strict=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model 'bert' is not supported; supported: gpt2, llama"),
        ({"tokenizer__ggml__pre": "chameleon"}, "tokenizer.ggml.pre 'chameleon' is not supported; supported: gpt-2"),
        ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre 'default' is not supported"),
        ({"tokenizer__ggml__merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens, the vocabulary, is missing"),
        ({"tokenizer__ggml__token_type": [1, 1]}, "token_type has 2 entries for 512 tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, object], message: str, folder: Path, tmp_path: Path
) -> None:
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", **changes)
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(path)
