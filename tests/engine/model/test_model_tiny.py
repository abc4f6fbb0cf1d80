"""Making tiny checkpoints: deterministic, complete, by command too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from kvbaton.engine.model.loader import load_model
from kvbaton.engine.tiny import NoGoodSeed, TinySpec, main, make_tiny, probe_prompts
from support.oracle import FAMILIES, TinyModels

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_known_seeds_are_taken_at_once(tiny_model: TinyModels, tmp_path: Path, family: str) -> None:
    """Guards quick creation, and that two machines' checkpoints are the same to the byte."""
    first = tiny_model(family)
    make_tiny(tmp_path, TinySpec(family=family))
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (first / name).read_bytes(), name


@pytest.mark.slow
def test_the_command_makes_a_model_of_the_wanted_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--family mixtral --layers 3 --hidden 96 --kv-heads 4 --vocab 600 --dtype bfloat16"
    assert main([str(tmp_path / "out"), *options.split()]) == 0
    assert "mixtral model with seed" in capsys.readouterr().out
    model = load_model(tmp_path / "out", torch.device("cpu"))
    config = model.config
    assert (config.num_layers, config.hidden_size, config.num_kv_heads, config.vocab_size) == (3, 96, 4, 600)
    assert model.decoder.dtype == torch.bfloat16
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() == 512


def test_sizes_that_cannot_work_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "out"), "--head-dim", "15"])
    assert caught.value.code == 1
    assert "head_dim 15 is odd" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_that_cannot_behave_is_not_written(tmp_path: Path) -> None:
    """Guards tests that rely on clear winners: a model too small to be varied is refused, not saved."""
    with pytest.raises(NoGoodSeed, match=r"none of the seeds 5\.\.44"):
        make_tiny(tmp_path, TinySpec(layers=1, hidden=8, heads=1, kv_heads=1, head_dim=2, seed=5))
    assert not (tmp_path / "model.safetensors").exists()


def test_unchecked_takes_the_first_seed(tmp_path: Path) -> None:
    spec = TinySpec(layers=1, hidden=8, heads=1, kv_heads=1, head_dim=2, seed=5, check=False)
    assert make_tiny(tmp_path, spec) == 5
    assert load_model(tmp_path, torch.device("cpu")).config.hidden_size == 8


def test_probe_prompts_cover_the_lengths_that_exactness_is_claimed_for() -> None:
    assert [len(prompt) for prompt in probe_prompts()] == [4, 17, 32, 50, 75, 128, 201]
    assert probe_prompts() == probe_prompts()
