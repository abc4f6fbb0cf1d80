"""Bias, min_tokens and penalties against their definitions, and against transformers where it has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sampling.logit_edits import FORBIDDEN, edit_logits, needs_edits
from kvbaton.engine.sequence import Sequence

VOCAB = 12


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    seq = Sequence(Request("r", tuple(prompt), SamplingParams(max_tokens=99, **sampling)), 0.0)
    seq.tokens.extend(output)
    return seq


def edited(*seqs: Sequence) -> torch.Tensor:
    """Rows after the edits, and the check that a row alone comes out the same."""
    rows = original(len(seqs))
    edit_logits(rows, seqs)
    for i, seq in enumerate(seqs):
        alone = original(len(seqs))[i : i + 1].clone()
        edit_logits(alone, [seq])
        assert torch.equal(alone[0], rows[i])
    return rows


def original(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3))


def test_nothing_asked_nothing_done() -> None:
    """Guards plain requests from their neighbours' edits."""
    plain = sequence([1, 2], [3])
    assert not needs_edits(plain)
    rows = edited(plain, sequence([1], [], logit_bias=((4, 5.0),)))
    assert torch.equal(rows[0], original(2)[0])


def test_bias_is_added_to_its_token() -> None:
    """Guards logit_bias; a token named twice keeps the last value, as in a JSON object."""
    seq = sequence([1], [], logit_bias=((4, 5.0), (7, -100.0), (4, 2.0)))
    assert needs_edits(seq)
    wanted = original(1)
    wanted[0, 4] += 2.0
    wanted[0, 7] -= 100.0
    assert torch.equal(edited(seq), wanted)


@pytest.mark.parametrize(("num_output", "forbidden"), [(0, True), (2, True), (3, False)])
def test_min_tokens_forbids_stop_tokens_until_then(num_output: int, forbidden: bool) -> None:
    """Guards min_tokens as transformers counts it: that many tokens come before the first stop token may."""
    seq = sequence([1, 5], [2] * num_output, min_tokens=3, stop_token_ids=(5, 9, 5))
    rows = edited(seq)
    assert needs_edits(seq) == forbidden
    oracle = MinNewTokensLengthLogitsProcessor(2, 3, [5, 9], device="cpu")
    wanted = oracle(torch.tensor([seq.tokens]), original(1)).clamp_min(FORBIDDEN)
    assert torch.equal(rows, wanted)


def test_forbidding_every_token_leaves_a_distribution() -> None:
    """Guards against NaN when all of a small vocabulary stops."""
    rows = edited(sequence([1], [], min_tokens=1, stop_token_ids=tuple(range(VOCAB))))
    assert torch.softmax(rows, -1).tolist() == [pytest.approx([1 / VOCAB] * VOCAB)]


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    """Guards its two signs, and that it sees the prompt and the output, each token once."""
    seq = sequence([1, 2, 2, 3], [8, 2], repetition_penalty=penalty)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seq.tokens]), original(1))
    torch.testing.assert_close(edited(seq), wanted, rtol=0, atol=1e-6)


def test_presence_and_frequency_count_the_output_alone() -> None:
    """Guards OpenAI's definition: logit - count * frequency - (count > 0) * presence, prompt not counted."""
    seq = sequence([1, 1, 4], [8, 2, 8, 8], presence_penalty=0.5, frequency_penalty=0.25)
    wanted = original(1)
    wanted[0, 8] -= 3 * 0.25 + 0.5
    wanted[0, 2] -= 0.25 + 0.5
    torch.testing.assert_close(edited(seq), wanted, rtol=0, atol=1e-6)


def test_tokens_emitted_before_a_resume_are_output() -> None:
    """Guards resumed requests: penalties and min_tokens must go on as if nothing had happened."""
    sampling = {"presence_penalty": 1.0, "repetition_penalty": 1.2, "min_tokens": 3, "stop_token_ids": (9,)}
    whole = sequence([1, 2], [8, 2], **sampling)
    request = Request("r", (1, 2), whole.sampling, emitted=(8, 2), epoch=1)
    rows = original(1)
    edit_logits(rows, [Sequence(request, 0.0)])
    assert torch.equal(rows, edited(whole))


def test_edits_combine_in_order() -> None:
    """Guards the order bias, min_tokens, repetition, frequency and presence: it shows in the result."""
    seq = sequence(
        [1], [4], logit_bias=((4, 3.0),), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=1.0
    )
    biased = original(1)[0, 4] + 3.0
    assert biased > 0
    assert edited(seq)[0, 4].item() == pytest.approx(biased.item() / 2.0 - 1.5)
