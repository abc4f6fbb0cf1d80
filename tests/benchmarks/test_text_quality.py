"""Perplexity is measured on what the engine computes, and is transformers' own in float32."""

from __future__ import annotations

import pytest
import torch
from text_quality import CHUNK, WINDOW, loss_of, windows

from kvbaton.engine.model.loader import load_model
from kvbaton.engine.text.tokenizer import Tokenizer
from support.oracle import TinyModels, oracle_logits

pytestmark = pytest.mark.slow


def test_the_loss_is_transformers_own(tiny_model: TinyModels) -> None:
    """Guards the shift by one, the last token, and what lies between two chunks."""
    folder = tiny_model("llama")
    window = windows(Tokenizer.load(folder), 1)[0][: 2 * CHUNK + 40]
    wanted = torch.nn.functional.cross_entropy(
        oracle_logits(folder, window)[:-1], torch.tensor(window[1:]), reduction="sum"
    )
    decoder = load_model(folder, torch.device("cpu"), "float32").decoder
    assert loss_of(decoder, window, torch.float32) == pytest.approx(wanted.item(), rel=1e-5)


def test_windows_are_whole(tiny_model: TinyModels) -> None:
    tokenizer = Tokenizer.load(tiny_model("llama"))
    assert [len(window) for window in windows(tokenizer, 3)] == [WINDOW] * 3
    with pytest.raises(SystemExit, match="windows need"):
        windows(tokenizer, 10_000)
