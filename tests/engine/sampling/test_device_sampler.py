"""Tokens drawn on the device: the same as the sampler's, whatever stands beside a row, and where that gives up."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sampling import device_sampler
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.engine.sampling.sampler import Draw, sample_tokens
from kvbaton.engine.sampling.token_draw import draw_keys
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.draw import DrawRows, philox_keys

CPU = torch.device("cpu")
VOCAB = 3000


def draw(row: int, position: int = 5, sample: int = 0, **sampling: Any) -> Draw:
    params = SamplingParams(max_tokens=10, **{"temperature": 1.0, "seed": row, **sampling})
    return Draw(Sequence(Request("r", tuple(range(position)), params), 0.0), sample, row)


def logits_of(rows: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def drawn(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    sampler = DeviceSampler(CPU)
    assert sampler.takes(draws)
    return sampler.start(logits, draws).wait()


def wanted(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    return [one.token_id for one in sample_tokens(logits, draws)]


def test_keys_equal_the_host_generator_to_the_bit() -> None:
    """A resumed request draws with keys made elsewhere: one differing bit and its text changes in mid-sentence."""
    values = [0, 1, -1, (1 << 63) - 1, -(1 << 63), 0x123456789ABCDEF]
    cases = list(itertools.product(values, (0, 1, 15), (0, 1, 131071, 1 << 33)))
    seeds, samples, positions = (list(column) for column in zip(*cases, strict=True))
    tensors = [torch.tensor(column) for column in (seeds, samples, positions)]
    zeros = torch.zeros(len(cases))
    got = philox_keys(DrawRows(*tensors, zeros, zeros, zeros))
    assert got.numpy().view("uint64").tolist() == draw_keys(seeds, samples, positions).tolist()
    assert len(set(got.tolist())) == len(cases)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.4},
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3},
        {"top_k": 30, "temperature": 0.01},
        {"top_k": VOCAB + 1},
    ],
    ids=str,
)
def test_each_kind_of_row_draws_what_the_sampler_draws(sampling: dict[str, Any]) -> None:
    """Guards every cut, ties at its edge included (logits are rounded to bfloat16, so many are equal)."""
    logits = logits_of(24).bfloat16().float()
    draws = [draw(i, position=3 + i, sample=i % 3, **sampling) for i in range(24)]
    assert drawn(logits, draws) == wanted(logits, draws)


def test_rows_of_every_kind_share_a_batch() -> None:
    """A row's parameters must reach that row and no other; its draw must not depend on its neighbours."""
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 3}, {}, {"top_p": 0.5}, {"min_p": 0.3}]
    draws = [draw(i, **kinds[i % 5]) for i in range(23)]
    logits = logits_of(23)
    got = drawn(logits, draws)
    assert got == wanted(logits, draws)
    for i in (0, 1, 2, 3, 4, 22):
        alone = Draw(draws[i].seq, 0, 0)
        assert drawn(logits[i : i + 1], [alone]) == [got[i]]


def test_cuts_beyond_the_horizon_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nucleus or k wider than the horizon cannot be cut there: those rows, and only those, go to the sampler."""
    asked: list[int] = []

    def counted(logits: torch.Tensor, draws: list[Draw]) -> list[Any]:
        asked.append(len(draws))
        return sample_tokens(logits, draws)

    monkeypatch.setattr(device_sampler, "HORIZON", 64)
    monkeypatch.setattr(device_sampler, "sample_tokens", counted)
    logits = logits_of(6, spread=0.5)
    logits[5, 63:] = logits[5].max()  # all equal: the 10th is as likely as those past the horizon
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.95}, {"top_k": 2}, {"top_k": 900}, {"top_p": 1e-4}, {"top_k": 10}]
    draws = [draw(i, **kind) for i, kind in enumerate(kinds)]
    got = drawn(logits, draws)
    assert asked == [3]
    assert got == wanted(logits, draws)


def test_what_it_does_not_serve_is_left_to_the_sampler() -> None:
    """Taking a row with a penalty, a bias or log-probabilities would silently drop what the client asked for."""
    sampler = DeviceSampler(CPU)
    assert sampler.takes([draw(0), draw(1, temperature=0.0)])
    refused: list[list[Draw]] = [
        [draw(0, logprobs=0)],
        [draw(0), draw(1, logit_bias=((1, 2.0),))],
        [draw(0, min_tokens=3, stop_token_ids=(2,))],
        [draw(1), draw(0)],
        [draw(0), draw(0, sample=1)],
    ]
    for draws in refused:
        assert not sampler.takes(draws)
