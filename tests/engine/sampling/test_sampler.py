"""Which token each draw of a mixed batch gets: its own, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbaton.engine.batch import SampledToken
from kvbaton.engine.request import Request, SamplingParams, TokenLogprobs
from kvbaton.engine.sampling import sampler
from kvbaton.engine.sampling.sampler import Draw, sample_tokens
from kvbaton.engine.sampling.token_draw import draw_keys, draw_tokens
from kvbaton.engine.sequence import Sequence

VOCAB = 300


def sequence(prompt: list[int], output: list[int] | None = None, **sampling: Any) -> Sequence:
    seq = Sequence(Request("r", tuple(prompt), SamplingParams(max_tokens=99, **sampling)), 0.0)
    seq.tokens.extend(output or [])
    return seq


def logits_of(rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5))


def mixed_batch() -> list[Sequence]:
    """Sixteen sequences, no two with the same parameters or length; every path of the sampler is taken."""
    rows: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "frequency_penalty": 0.3},
        {"temperature": 0.0, "logit_bias": ((7, 90.0),), "logprobs": 20},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 0.8},
        {"temperature": 0.0, "min_tokens": 50, "stop_token_ids": (1, 2, 3)},
        {"temperature": 1.0, "seed": 99},
        {"temperature": 1.0, "seed": -99, "logprobs": 0},
        {"temperature": 0.2, "top_p": 0.1},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1e-6},
        {"temperature": 1.0, "logit_bias": ((9, -100.0), (10, 3.0))},
    ]
    return [sequence(list(range(1, i + 3)), list(range(50, 50 + i)), **values) for i, values in enumerate(rows)]


def test_a_draw_is_the_same_alone_and_in_company() -> None:
    """Guards the promise that a request's tokens never depend on its batch."""
    logits, seqs = logits_of(16), mixed_batch()
    together = sample_tokens(logits, [Draw(seq, 0, row) for row, seq in enumerate(seqs)])
    alone = [sample_tokens(logits[row : row + 1], [Draw(seq, 0, 0)])[0] for row, seq in enumerate(seqs)]
    backwards = sample_tokens(logits, [Draw(seqs[row], 0, row) for row in reversed(range(16))])
    assert [one.token_id for one in together] == [one.token_id for one in alone]
    assert [one.token_id for one in together] == [one.token_id for one in reversed(backwards)]
    for one, other in zip(together, alone, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)


def test_logits_stay_as_they_are() -> None:
    """Guards the log-probabilities, and prompt rows that read the same logits again."""
    logits, seqs = logits_of(16), mixed_batch()
    before = logits.clone()
    sample_tokens(logits, [Draw(seq, 0, row) for row, seq in enumerate(seqs)])
    assert torch.equal(logits, before)


def test_greedy_takes_the_best_after_edits() -> None:
    """Guards that a bias can change a greedy token, and that nothing else does."""
    logits = logits_of(2)
    best = logits.argmax(-1).tolist()
    plain, forbidden = sequence([1], temperature=0.0), sequence([1], temperature=0.0, logit_bias=((best[1], -100.0),))
    second = logits[1].topk(2).indices[1].item()
    drawn = sample_tokens(logits, [Draw(plain, 0, 0), Draw(forbidden, 0, 1)])
    assert drawn == [SampledToken(best[0]), SampledToken(second)]


def test_a_greedy_batch_is_one_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the fast path: no random numbers, no edits, no cuts, no copy of the logits."""

    def forbidden(*_: object) -> None:
        raise AssertionError("a plain greedy batch must not come here")

    for name in ("draw_keys", "draw_tokens", "edit_logits", "token_logprobs"):
        monkeypatch.setattr(sampler, name, forbidden)
    logits = logits_of(4)
    seqs = [sequence([1, 2], temperature=0.0, min_tokens=1) for _ in range(4)]
    drawn = sample_tokens(logits, [Draw(seq, 0, row) for row, seq in enumerate(seqs)])
    assert [one.token_id for one in drawn] == logits.argmax(-1).tolist()
    same = [Draw(seq, 0, row) for row, seq in enumerate(seqs)]
    assert sampler._edited(logits, same) is logits


def test_the_number_of_a_draw_is_seed_sample_position() -> None:
    """Guards the key: sample index and position count, the prompt's length and the batch do not otherwise."""
    logits = logits_of(1)
    seq = sequence([1, 2, 3], [4, 5], temperature=1.0, seed=77)
    drawn = sample_tokens(logits, [Draw(seq, sample, 0) for sample in range(16)])
    params = [seq.sampling] * 16
    wanted = draw_tokens(logits.expand(16, -1), params, draw_keys([77] * 16, range(16), [5] * 16))
    assert [one.token_id for one in drawn] == wanted.tolist()
    assert len({one.token_id for one in drawn}) > 4


def test_a_resumed_sample_draws_what_the_lost_one_would_have() -> None:
    """Guards recovery: prompt + emitted tokens on another engine continue the same random sequence."""
    logits = logits_of(1)
    whole = sequence([1, 2, 3], [4, 5], temperature=1.0, seed=3, frequency_penalty=0.5)
    request = Request("r", (1, 2, 3), whole.sampling, sample_indices=(2,), emitted=(4, 5), epoch=1)
    resumed = Sequence(request, 0.0)
    assert sample_tokens(logits, [Draw(whole, 2, 0)]) == sample_tokens(logits, [Draw(resumed, 2, 0)])


def test_samples_of_one_prompt_share_a_row() -> None:
    """Guards n > 1 next to other rows: each draw reads the row that it names."""
    logits = logits_of(2)
    many, one = sequence([1], temperature=1.0, seed=1), sequence([2], temperature=0.0)
    drawn = sample_tokens(logits, [Draw(many, 0, 0), Draw(many, 1, 0), Draw(many, 2, 0), Draw(one, 0, 1)])
    alone = [sample_tokens(logits[:1], [Draw(many, i, 0)])[0] for i in range(3)]
    assert drawn[:3] == alone
    assert drawn[3].token_id == logits[1].argmax().item()


def test_logprobs_are_the_models_own() -> None:
    """Guards what clients see: raw log-softmax, best first, the chosen token's own, only where asked for."""
    logits = logits_of(3)
    hot = sequence([1], temperature=2.0, top_k=2, logit_bias=((7, 90.0),), logprobs=2)
    zero, none = sequence([1], temperature=0.0, logprobs=0), sequence([1], temperature=0.0)
    drawn = sample_tokens(logits, [Draw(none, 0, 2), Draw(hot, 0, 0), Draw(zero, 0, 1)])
    raw = torch.log_softmax(logits, -1)
    best = raw[0].topk(2)
    assert drawn[0].logprobs is None
    assert drawn[1].token_id == 7
    assert drawn[1].logprobs == TokenLogprobs(
        pytest.approx(raw[0, 7].item()),
        tuple(
            (token, pytest.approx(value)) for token, value in zip(*map(torch.Tensor.tolist, best[::-1]), strict=True)
        ),
    )
    assert drawn[2].logprobs == TokenLogprobs(pytest.approx(raw[1].max().item()), ())


def test_top_logprobs_stop_at_a_small_vocabulary() -> None:
    """Guards a vocabulary smaller than the number of logprobs asked for."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    (drawn,) = sample_tokens(logits, [Draw(sequence([1], temperature=0.0, logprobs=20), 0, 0)])
    assert drawn.logprobs is not None
    assert [token for token, _ in drawn.logprobs.top] == [2, 1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    """Guards migration between devices: from equal logits every path must choose the same token."""
    logits, seqs = logits_of(16), mixed_batch()
    draws = [Draw(seq, 0, row) for row, seq in enumerate(seqs)]
    there = sample_tokens(logits.cuda(), draws)
    assert [one.token_id for one in there] == [one.token_id for one in sample_tokens(logits, draws)]
