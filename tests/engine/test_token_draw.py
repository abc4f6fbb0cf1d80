"""Temperature, cuts and the inverse distribution: against transformers' filters, and exact in every batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvbaton.engine import token_draw
from kvbaton.engine.request import SamplingParams
from kvbaton.engine.token_draw import WEIGHT_BITS, draw_tokens, keep_top_k, keep_top_p, token_weights

VOCAB = 400


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def params(**values: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **values)  # type: ignore[arg-type]


def kept(weights: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in weights]


def test_weights_are_the_softmax() -> None:
    """Guards temperature and scale: integer weights over their sum are the probabilities."""
    logits = logits_of(3)
    weights = token_weights(logits, [params(temperature=t) for t in (0.5, 1.0, 2.0)])
    for row, temperature in enumerate((0.5, 1.0, 2.0)):
        wanted = torch.softmax(logits[row].double() / temperature, -1)
        torch.testing.assert_close(
            weights[row].double() / weights[row].sum(), wanted, rtol=0, atol=VOCAB * 2.0**-WEIGHT_BITS
        )
    assert weights.amax(-1).tolist() == [1 << WEIGHT_BITS] * 3


@pytest.mark.parametrize("k", [1, 7, VOCAB - 1])
def test_top_k_equals_transformers(k: int) -> None:
    """Guards the count of kept tokens."""
    logits = logits_of(2)
    wanted = TopKLogitsWarper(k)(None, logits).isfinite()
    weights = keep_top_k(token_weights(logits, [params()] * 2), [k, k])
    assert kept(weights) == [row.nonzero().flatten().tolist() for row in wanted]


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("guess", [4, 256, VOCAB])
def test_top_p_equals_transformers(monkeypatch: pytest.MonkeyPatch, p: float, guess: int) -> None:
    """Guards the nucleus, whether the first guess of its size suffices or the whole row must be sorted."""
    monkeypatch.setattr(token_draw, "FIRST_GUESS", guess)
    logits = logits_of(3)
    wanted = TopPLogitsWarper(p)(None, logits).isfinite()
    weights = keep_top_p(token_weights(logits, [params()] * 3), [p] * 3)
    assert kept(weights) == [row.nonzero().flatten().tolist() for row in wanted]


@pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
def test_min_p_equals_transformers(p: float) -> None:
    """Guards the threshold relative to the best token."""
    logits = logits_of(2)
    wanted = MinPLogitsWarper(p)(None, logits).isfinite()
    assert kept(token_weights(logits, [params(min_p=p)] * 2)) == [row.nonzero().flatten().tolist() for row in wanted]


def test_cuts_touch_only_the_rows_that_ask() -> None:
    """Guards ragged batches: each row gets its own k and p, off means untouched."""
    plain = token_weights(logits_of(4), [params()] * 4)
    before = plain.clone()
    cut = keep_top_p(keep_top_k(plain, [0, 3, 0, 5]), [1.0, 1.0, 0.5, 0.9])
    assert torch.equal(plain, before)
    assert torch.equal(cut[0], plain[0])
    for row, (k, p) in enumerate([(0, 1.0), (3, 1.0), (0, 0.5), (5, 0.9)]):
        alone = keep_top_p(keep_top_k(plain[row : row + 1], [k]), [p])
        assert torch.equal(cut[row], alone[0])
    assert [len(row) for row in kept(cut)][1] == 3


def test_ties_are_kept_together() -> None:
    """Guards determinism: which of two equal tokens survives must not depend on a sort."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    weights = token_weights(logits, [params()])
    assert kept(keep_top_k(weights, [2])) == [[1, 2, 3]]
    assert kept(keep_top_p(weights, [0.4])) == [[1, 2, 3]]


def test_a_draw_inverts_the_distribution() -> None:
    """Guards the inverse: each token owns the interval of its probability, zero-weight tokens own none."""
    logits = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25]])).clamp_min(-1e30)
    for uniform, wanted in ((0.0, 0), (0.2499, 0), (0.25001, 2), (0.7499, 2), (0.75001, 3), (1 - 2**-53, 3)):
        assert draw_tokens(logits, [params()], np.array([uniform])).tolist() == [wanted]


def test_the_last_number_never_passes_the_end() -> None:
    """Guards the rounding of u * total: with u close to 1 it may reach the total, where no token is."""
    logits = torch.zeros(1, 1 << 17)
    tokens = draw_tokens(logits, [params()], np.array([1 - 2**-53]))
    assert tokens.tolist() == [(1 << 17) - 1]


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    """Guards reproducibility: sixteen different rows drawn together, alone, and in reverse give the same tokens."""
    logits = logits_of(16)
    rows = [
        params(temperature=0.3 + i / 10, top_k=(i % 4) * 5, top_p=1.0 - (i % 3) / 10, min_p=(i % 2) / 100)
        for i in range(16)
    ]
    numbers = np.linspace(0.001, 0.999, 16)
    together = draw_tokens(logits, rows, numbers).tolist()
    alone = [draw_tokens(logits[i : i + 1], rows[i : i + 1], numbers[i : i + 1]).item() for i in range(16)]
    backwards = draw_tokens(logits.flip(0), rows[::-1], numbers[::-1].copy()).tolist()
    assert together == alone == backwards[::-1]
    assert len(set(together)) > 8


def test_frequencies_follow_the_distribution() -> None:
    """Guards the whole chain statistically: chi-squared over 20,000 draws after top_k."""
    logits = logits_of(1, vocab=50)
    count, k = 20_000, 10
    numbers = np.random.default_rng(1).random(count)
    drawn = draw_tokens(logits.expand(count, -1), [params(temperature=1.5, top_k=k)] * count, numbers)
    weights = keep_top_k(token_weights(logits, [params(temperature=1.5)]), [k])[0]
    seen = torch.bincount(drawn, minlength=50)
    assert seen[weights == 0].sum() == 0
    wanted = (weights / weights.sum() * count)[weights > 0]
    assert ((seen[weights > 0] - wanted) ** 2 / wanted).sum() < 27.9  # 9 degrees of freedom, p = 0.001
