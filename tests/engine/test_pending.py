"""Token ids that the host does not know yet: how they are named, and what the device puts there."""

from __future__ import annotations

import pytest
import torch

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.pending import TokenFeed
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sampling.sampler import Draw
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.draw import TorchDraw


def decoding(*tokens: int) -> Sequence:
    seq = Sequence(Request("r", tokens, SamplingParams(max_tokens=10)), 0.0)
    seq.num_computed = len(tokens) - 1
    return seq


def test_known_tokens_are_taken_as_they_are() -> None:
    seq = decoding(5, 6, 7)
    assert TokenFeed(TorchDraw()).tokens(ScheduledRow(seq, 1, (0,))) == [7]
    seq.num_computed = 0
    assert TokenFeed(TorchDraw()).tokens(ScheduledRow(seq, 2, (), ahead=1)) == [6, 7]


@pytest.mark.parametrize("on_device", [True, False])
def test_tokens_of_the_step_before_reach_their_own_rows(on_device: bool) -> None:
    """Guards a row that reads its neighbour's token when the batch changes its order."""
    feed, seqs = TokenFeed(TorchDraw()), [decoding(1, 2), decoding(3, 4), decoding(5, 6)]
    drawn = [100, 200, 300]
    draws = [Draw(seq, 0, i) for i, seq in enumerate(seqs)]
    feed.drew(draws, torch.tensor(drawn) if on_device else drawn)
    rows = [ScheduledRow(seqs[2], 1, (0,), 1), ScheduledRow(decoding(8, 9), 1, (0,)), ScheduledRow(seqs[0], 1, (0,), 1)]
    ids = torch.tensor([token for row in rows for token in feed.tokens(row)] + [0])
    assert ids.tolist() == [-3, 9, -1, 0]
    feed.fill(rows, ids)
    assert ids.tolist() == [300, 9, 100, 0]


def test_draw_that_is_left_to_the_host_gives_a_token_that_exists() -> None:
    """An id below zero would be read from outside the embedding."""
    feed, seq = TokenFeed(TorchDraw()), decoding(1, 2)
    feed.drew([Draw(seq, 0, 0)], torch.tensor([-1]))
    row = ScheduledRow(seq, 1, (0,), 1)
    ids = torch.tensor(feed.tokens(row))
    feed.fill([row], ids)
    assert ids.tolist() == [0]


def test_token_that_nobody_draws_is_refused() -> None:
    """Guards a sequence that is scheduled ahead of a step that it was not in."""
    feed, seq = TokenFeed(TorchDraw()), decoding(1, 2)
    feed.drew([Draw(decoding(3, 4), 0, 0)], [9])
    with pytest.raises(KeyError):
        feed.tokens(ScheduledRow(seq, 1, (0,), 1))
