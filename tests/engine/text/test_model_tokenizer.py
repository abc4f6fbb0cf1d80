"""Tokenizer and incremental detokenizer, on the tiny byte-level vocabulary and on a SentencePiece-like one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.request import InvalidRequest
from kvbaton.engine.text.tokenizer import Tokenizer, check_tokenizer
from kvbaton.settings import ConfigError
from support.oracle import TinyModels

TEXTS = (
    "Plain words, 123 and\n\ttabs.",
    "Grüße aus Köln – «déjà vu»",
    "日本語のテキスト、한국어, العربية",
    "family: 👨‍👩‍👧‍👦 flag: 🇩🇪 skin: 👍🏽",
    "a\ufffdb",
    " leading and trailing ",
)


@pytest.fixture(scope="session")
def folder(tiny_model: TinyModels) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture
def editable(folder: Path, tmp_path: Path) -> Path:
    """A copy whose files a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture(scope="session")
def sentencepiece_like(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Pieces with ▁ for spaces and byte fallback, as Llama 2 and Mistral have them."""
    target = Path(shutil.copytree(folder, tmp_path_factory.mktemp("sp") / "model"))
    words = ["▁", "▁the", "▁sea", "t", "h", "e", "s", "a", "l", "o", "é"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    rust = RustTokenizer(
        BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    rust.add_special_tokens(["<unk>", "<s>", "</s>"])
    rust.save(str(target / "tokenizer.json"))
    settings_ = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings_))
    return Tokenizer.load(target)


def _stream(tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = (), skip: bool = True) -> list[str]:
    stream = tokenizer.detokenizer(prompt, skip_special_tokens=skip)
    return [*(stream.push(token) for token in ids), stream.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(_stream(tokenizer, tokenizer.encode(text))) == text


def test_a_character_comes_out_whole_with_its_last_byte(tokenizer: Tokenizer) -> None:
    """Guards clients from half characters: three tokens a character, and no U+FFFD on the way."""
    ids = tokenizer.encode("é日👍", add_special_tokens=False)
    assert _stream(tokenizer, ids) == ["", "é", "", "", "日", "", "", "", "👍", ""]


def test_an_incomplete_character_is_flushed_as_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a👍", add_special_tokens=False)[:-1]
    assert _stream(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


@given(st.lists(st.integers(0, 511), max_size=80), st.booleans())
@settings(max_examples=200, deadline=None)
def test_streamed_text_equals_decoding_everything(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Guards every invalid UTF-8 sequence: the stream must break it up as the tokenizer's own decoder does."""
    assert "".join(_stream(tokenizer, ids, skip=skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>", add_special_tokens=False)
    assert len(ids) == 2 + len(tokenizer.encode("hi", add_special_tokens=False))
    assert "".join(_stream(tokenizer, ids)) == "hi"
    assert "".join(_stream(tokenizer, ids, skip=False)) == "<|im_start|>hi<|im_end|>"


def test_token_bytes_join_to_the_text(tokenizer: Tokenizer) -> None:
    """Guards the `bytes` of logprobs."""
    ids = tokenizer.encode("日本 <|im_end|> ok", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "日本 <|im_end|> ok"
    assert tokenizer.token_text(ids[0]) == "\ufffd"


def test_bos_is_added_once(tokenizer: Tokenizer) -> None:
    """Guards against the double BOS of a template that writes one itself."""
    (bos,) = tokenizer.encode("<|bos|>", add_special_tokens=False)
    assert tokenizer.encode("hi").count(bos) == 1
    chat = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "hi"}]), add_special_tokens=False)
    assert chat.count(bos) == 1


def test_chat_is_rendered_by_the_models_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    wanted = "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == wanted
    assert tokenizer.render_chat(messages) == wanted + "<|im_start|>assistant\n"


def test_a_template_file_is_read(editable: Path) -> None:
    """transformers 5 saves chat_template.jinja beside the tokenizer's settings."""
    settings_ = json.loads((editable / "tokenizer_config.json").read_text())
    del settings_["chat_template"]
    (editable / "tokenizer_config.json").write_text(json.dumps(settings_))
    (editable / "chat_template.jinja").write_text("{{ messages[0].content }}|{{ mood }}")
    rendered = Tokenizer.load(editable).render_chat(
        [{"role": "user", "content": "hi"}], template_options={"mood": "calm"}
    )
    assert rendered == "hi|calm"


def test_a_model_without_template_says_what_to_use(editable: Path) -> None:
    settings_ = json.loads((editable / "tokenizer_config.json").read_text())
    del settings_["chat_template"]
    (editable / "tokenizer_config.json").write_text(json.dumps(settings_))
    tokenizer = Tokenizer.load(editable)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match=r"no chat template.*use /v1/completions") as caught:
        tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_a_template_may_refuse(editable: Path) -> None:
    settings_ = json.loads((editable / "tokenizer_config.json").read_text())
    settings_["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (editable / "tokenizer_config.json").write_text(json.dumps(settings_))
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        Tokenizer.load(editable).render_chat([{"role": "user", "content": "hi"}])


def test_bad_messages_are_the_clients_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="messages is empty"):
        tokenizer.render_chat([])
    with pytest.raises(InvalidRequest, match="chat template refuses"):
        tokenizer.render_chat([{"role": "user", "content": {"not": "text"}}])


def test_missing_and_damaged_tokenizers_are_named(editable: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")
    (editable / "tokenizer.json").write_text("{ not json")
    with pytest.raises(ConfigError, match=f"{editable}: the tokenizer cannot be read"):
        Tokenizer.load(editable)
    (editable / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer: none of tokenizer\.json"):
        Tokenizer.load(editable)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2TokenizerFast"])
def test_saved_truncation_and_padding_leave_prompts_alone(
    editable: Path, tokenizer_class: str, tokenizer: Tokenizer
) -> None:
    """Guards long prompts: a file saved in training cuts each at its `max_length`, and an answer comes all the same."""
    rust = RustTokenizer.from_file(str(editable / "tokenizer.json"))
    rust.enable_truncation(8)
    rust.enable_padding(length=64, pad_token="<|eos|>", pad_id=509)
    rust.save(str(editable / "tokenizer.json"))
    settings_ = json.loads((editable / "tokenizer_config.json").read_text()) | {"tokenizer_class": tokenizer_class}
    (editable / "tokenizer_config.json").write_text(json.dumps(settings_))
    loaded = Tokenizer.load(editable)
    for text in ("the sea", "the sea " * 100):
        ids = loaded.encode(text)
        assert len(ids) == len(loaded.encode(text, add_special_tokens=False)) + 1
        assert loaded.decode(ids) == text
        if tokenizer_class == "PreTrainedTokenizerFast":
            assert ids == tokenizer.encode(text)


def test_a_sentencepiece_file_alone_is_refused_with_what_to_do(editable: Path) -> None:
    """Guards a launch that gets as far as its first prompt: nothing installed here reads such a file."""
    (editable / "tokenizer.json").rename(editable / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json.* cannot be converted .*save_pretrained"):
        check_tokenizer(editable)


def test_a_vocabulary_with_merges_needs_no_tokenizer_json(editable: Path, tokenizer: Tokenizer) -> None:
    """transformers builds the tokenizer of a Qwen from its older pair of files."""
    RustTokenizer.from_file(str(editable / "tokenizer.json")).model.save(str(editable))
    (editable / "tokenizer.json").unlink()
    settings_ = json.loads((editable / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
    (editable / "tokenizer_config.json").write_text(json.dumps(settings_))
    check_tokenizer(editable)
    assert Tokenizer.load(editable).encode("the sea", add_special_tokens=False) == tokenizer.encode(
        "the sea", add_special_tokens=False
    )


def test_eos_ids_come_from_both_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Guards stopping: generation_config.json lists ids that config.json lacks."""
    assert sorted(map(tokenizer.token_text, load_model_config(folder).eos_token_ids)) == ["<|eos|>", "<|im_end|>"]


@pytest.mark.parametrize("text", ["the sea", "é là the", "sea 日本 👍 the", "x"])
def test_neighbour_dependent_decoders_stream_the_same_text(sentencepiece_like: Tokenizer, text: str) -> None:
    ids = sentencepiece_like.encode(text, add_special_tokens=False)
    parts = _stream(sentencepiece_like, ids)
    assert "".join(parts) == sentencepiece_like.decode(ids) == text
    assert not any("\ufffd" in part for part in parts)


def test_a_word_after_a_prompt_keeps_its_space(sentencepiece_like: Tokenizer) -> None:
    """Guards completions: the decoder strips a leading space only at the very start of a text."""
    prompt = tuple(sentencepiece_like.encode("the", add_special_tokens=False))
    sea = sentencepiece_like.encode("sea", add_special_tokens=False)
    assert "".join(_stream(sentencepiece_like, sea, prompt)) == " sea"


OFFLINE = """
import socket, sys
from pathlib import Path
calls = []
socket.getaddrinfo = lambda *a, **k: calls.append(a) or []
socket.socket.connect = lambda *a, **k: calls.append(a)
from kvbaton.engine.text.tokenizer import Tokenizer
print(len(Tokenizer.load(Path(sys.argv[1])).encode("the sea")), calls)
"""


@pytest.mark.process
def test_loading_asks_no_network(tiny_model: TinyModels) -> None:
    """Guards machines without internet: transformers looks some model types up on the hub when it may."""
    environment = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    command = [sys.executable, "-c", OFFLINE, str(tiny_model("mistral"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    length = len(Tokenizer.load(tiny_model("mistral")).encode("the sea"))
    assert done.stdout.split(maxsplit=1) == [str(length), "[]\n"]


@pytest.mark.process
def test_importing_the_module_is_free_of_torch_and_transformers() -> None:
    """Guards the router's and the ingress's start-up."""
    seen = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    code = f"import sys, kvbaton.engine.text.tokenizer; print({seen})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
