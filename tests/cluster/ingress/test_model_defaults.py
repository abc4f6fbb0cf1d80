"""What an ingress takes from a model's folder beside its sizes: how generation ends, and what it recommends."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbaton.cluster.http.service import SamplingDefaults
from kvbaton.cluster.ingress.ingress import end_tokens, sampling_defaults
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.text.tokenizer import Tokenizer
from kvbaton.settings import ConfigError
from support.oracle import TinyModels


@pytest.fixture
def folder(tiny_model: TinyModels, tmp_path: Path) -> Path:
    """A model whose files a test may change."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_tokenizers_eos_ends_too(folder: Path) -> None:
    """Guards chat fine-tunes whose config.json still names the base model's end: they never stopped."""
    edit(folder / "config.json", eos_token_id=509)
    edit(folder / "generation_config.json", eos_token_id=509)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_id == 511
    assert end_tokens(load_model_config(folder), tokenizer) == (509, 511)


def test_a_tokenizer_without_eos_adds_none(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_id is None
    assert end_tokens(load_model_config(folder), tokenizer) == (509, 511)


def test_an_eos_past_the_vocabulary_is_left_out(folder: Path) -> None:
    """An id that the model cannot draw would be refused as a stop token of every request."""
    config = replace(load_model_config(folder), vocab_size=511, eos_token_ids=(509,))
    assert end_tokens(config, Tokenizer.load(folder)) == (509,)


def test_generation_config_sets_the_defaults(folder: Path) -> None:
    edit(folder / "generation_config.json", temperature=0.6, top_k=20, max_new_tokens=300, max_length=2048)
    assert sampling_defaults(folder) == SamplingDefaults(temperature=0.6, top_k=20, max_new_tokens=300, max_length=2048)
    (folder / "generation_config.json").unlink()
    assert sampling_defaults(folder) == SamplingDefaults()


def test_settings_that_are_not_applied_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would draw other tokens by them; those at their neutral values are no news."""
    edit(folder / "generation_config.json", no_repeat_ngram_size=3, suppress_tokens=[5], num_beams=1, min_length=0)
    sampling_defaults(folder)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "sets no_repeat_ngram_size, suppress_tokens, which transformers applies" in caplog.text


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length"])
def test_a_length_below_one_is_refused(folder: Path, name: str) -> None:
    edit(folder / "generation_config.json", **{name: 0})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} must be at least 1, got 0"):
        sampling_defaults(folder)
