"""Streams of tokens give the text of the whole, for each kind of vocabulary, as the `tokenizers` library decodes it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from kvbaton.engine.text.detokenizer import MAX_RUN, PieceDetokenizer
from kvbaton.engine.text.tokenizer import Tokenizer

WORDS = ["▁", "▁the", "▁sea", "t", "h", "e", "s", "a", "l", "é", "日", "\ufffd", "▁▁"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS, "<tool_call>"]
SPECIAL = ["<unk>", "<s>", "</s>", "<tool_call>"]
EMOJI = "😀😁👨‍👩‍👧‍👦🇩🇪👍🏽é߷न€𝄞"


def wrap(rust: RustTokenizer, special: list[str]) -> Tokenizer:
    rust.add_special_tokens(special)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust))


def sentencepiece(*, strip: bool) -> Tokenizer:
    """Llama 2's and Mistral's decoder, which drops the first space; without `strip` Gemma's."""
    vocab = {piece: index for index, piece in enumerate(PIECES)}
    rust = RustTokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return wrap(rust, SPECIAL)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(BPE({char: index for index, char in enumerate([*alphabet, "Ġthe", "ðŁĺ"])}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    return wrap(rust, ["<s>", "<tool_call>"])


def word_piece() -> Tokenizer:
    words = ["[UNK]", "the", "sea", "##s", "##é", "n", "'", "##'", ".", "😀", "##👍", "\ufffd", "##\ufffd"]
    rust = RustTokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return wrap(rust, ["[UNK]"])


KINDS = {
    "llama": sentencepiece(strip=True),
    "gemma": sentencepiece(strip=False),
    "byte-level": byte_level(),
    "word-piece": word_piece(),
}
SIZES = {"llama": len(PIECES), "gemma": len(PIECES), "byte-level": 260, "word-piece": 13}
LLAMA = KINDS["llama"]


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    parts = tokenizer.detokenizer(prompt or [], skip_special_tokens=skip)
    return [*(parts.push(token) for token in ids), parts.flush()]


def raw(*parts: bytes | str) -> list[int]:
    """Ids of the llama kind: byte tokens for bytes, the piece for a string."""
    ids: list[int] = []
    for part in parts:
        ids += [3 + byte for byte in part] if isinstance(part, bytes) else [PIECES.index(part)]
    return ids


BYTES_OF_TEXT = st.text(alphabet=EMOJI + "ab \n", max_size=5).map(lambda text: list(text.encode()))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_decoded_whole(kind: str, data: st.DataObject, skip: bool) -> None:
    """Any tokens at all, which is where invalid bytes come from."""
    ids = data.draw(st.lists(st.integers(0, SIZES[kind] - 1), max_size=50))
    assert "".join(stream(KINDS[kind], ids, skip=skip)) == KINDS[kind].decode(ids, skip)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@given(
    st.lists(
        BYTES_OF_TEXT.map(lambda found: [3 + byte for byte in found])
        | st.lists(st.sampled_from(raw(b"\x80\xf0\x9f ", *WORDS, *SPECIAL)), max_size=3),
        max_size=7,
    ),
    st.booleans(),
)
@example([raw("😀👍🏽".encode(), b"\x80"), raw("▁the")], True)
@example([raw(b" ", "▁the")], True)
@settings(max_examples=300, deadline=None)
def test_characters_in_byte_tokens(kind: str, parts: list[list[int]], skip: bool) -> None:
    """Emoji in a row, joined ones, two to four bytes, broken ones behind whole ones, special tokens between."""
    ids = [token for part in parts for token in part][: MAX_RUN - 1]
    assert "".join(stream(KINDS[kind], ids, skip=skip)) == KINDS[kind].decode(ids, skip)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_follows_a_prompt(kind: str, data: st.DataObject) -> None:
    """The text of the whole begins with that of the prompt; the rest is what the stream gives."""
    tokens = st.integers(0, SIZES[kind] - 1)
    prompt, ids = data.draw(st.lists(tokens, max_size=12)), data.draw(st.lists(tokens, max_size=12))
    tokenizer = KINDS[kind]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    is_run = kind in ("llama", "gemma") and any(3 <= token < 259 for token in prompt)
    if whole.startswith(before) and not is_run and not before.endswith("\ufffd"):
        assert "".join(stream(tokenizer, ids, prompt)) == whole[len(before) :]


@pytest.mark.parametrize("prompt", ["😀", "the 👨‍👩‍👧‍👦", "é€😀😁"])
@pytest.mark.parametrize("text", ["😁", "👨‍👩‍👧‍👦🇩🇪", "é€😀a"])
def test_an_emoji_behind_a_prompt_that_ends_with_one(prompt: str, text: str) -> None:
    before, after = LLAMA.encode(prompt, add_special_tokens=False), raw(text.encode())
    assert "".join(stream(LLAMA, after, before)) == text


def test_a_run_is_out_when_it_ends_and_when_it_is_broken() -> None:
    assert stream(LLAMA, raw("😀é".encode(), "a")) == [""] * 6 + ["😀éa", ""]
    assert stream(LLAMA, raw("é".encode(), b"\x80\x80", "a")) == ["", "", "\ufffd" * 3, "\ufffd", "a", ""]
    assert stream(LLAMA, raw("a", "😀".encode()[:3])) == ["a", "", "", "", "\ufffd" * 3]


def test_long_runs_stream() -> None:
    """Guards scripts that a vocabulary lacks: one run may be a whole answer."""
    parts = stream(LLAMA, raw(("日本" * 40).encode()))
    assert "".join(parts) == "日本" * 40
    waits = [len(run) for run in "".join("x" if part else "." for part in parts).split("x")]
    assert max(waits) <= MAX_RUN


def test_whole_characters_are_known_before_they_are_out() -> None:
    """Guards stop strings against being found late."""
    parts = LLAMA.detokenizer()
    seen = []
    for token in raw("a", "é\n".encode()):
        parts.push(token)
        seen.append((parts.whole(), parts.begun()))
    assert seen == [("", 0), ("", 1), ("é", 1), ("é\n", 2)]
    assert (parts.flush(), parts.whole(), parts.begun()) == ("é\n", "", 0)


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_one_special_token_can_be_shown(kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = [*tokenizer.encode("<s>", False), *tokenizer.encode("<tool_call>", False)]
    parts = tokenizer.detokenizer(shown=["<tool_call>", "no such token"])
    assert "".join(parts.push(token) for token in ids).strip() == "<tool_call>"


def test_each_token_costs_the_same() -> None:
    """Guards long outputs: no push may decode more than two tokens, or a run once, whatever came before."""
    decoded: list[int] = []

    def decode(token_ids: list[int]) -> str:
        decoded.append(len(token_ids))
        return LLAMA.decode(token_ids)

    byte_of = {3 + byte: byte for byte in range(256)}.get
    words = raw("▁the", "é".encode(), "a") * 300
    parts = PieceDetokenizer(decode, byte_of, frozenset())
    for token in words:
        parts.push(token)
    assert max(decoded) == 2
    assert sum(decoded) <= 6 * len(words)
