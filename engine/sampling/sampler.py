"""Chooses the next token of each draw of a step, and says how probable it was.

    logits -> edits (bias, min_tokens, penalties) -> greedy: argmax
                                                  -> random: temperature, cuts, Gumbel-max

Sample `i` of a request at sequence position `p` uses the random bits of (seed, i, p) alone, so its tokens do not depend
on the batch, the engine, or a resume. A row does only the work that its parameters ask for: greedy ones are one argmax.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from kvbaton.engine.batch import SampledToken
from kvbaton.engine.request import TokenLogprobs
from kvbaton.engine.sampling.logit_edits import edit_logits, needs_edits
from kvbaton.engine.sampling.token_draw import draw_keys, draw_tokens
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.draw import best_tokens

LEAST_TEMPERATURE = 1e-5  # below, the best token has all the probability that a float can tell from 1


@dataclass(frozen=True, slots=True)
class Draw:
    """Sample index `sample` of `seq` draws from row `row` of the step's logits; several draws may share a row. `ahead`
    tokens before this one have been drawn and are not in `seq.tokens` yet."""

    seq: Sequence
    sample: int
    row: int
    ahead: int = 0

    @property
    def position(self) -> int:
        """Of the token to draw; true until the step before lands."""
        return len(self.seq.tokens) + self.ahead


def sample_tokens(logits: torch.Tensor, draws: list[Draw]) -> list[SampledToken]:
    """One token per draw from logits [rows, vocab] float32, which stay as they are."""
    chosen = _choose(logits, draws)
    asking = [i for i, draw in enumerate(draws) if draw.seq.sampling.logprobs is not None]
    if not asking:
        return [SampledToken(token_id) for token_id in chosen]
    logprobs: list[TokenLogprobs | None] = [None] * len(draws)
    found = token_logprobs(
        logits[[draws[i].row for i in asking]],
        [chosen[i] for i in asking],
        [draws[i].seq.sampling.logprobs or 0 for i in asking],
    )
    for i, value in zip(asking, found, strict=True):
        logprobs[i] = value
    return [SampledToken(token_id, value) for token_id, value in zip(chosen, logprobs, strict=True)]


def token_logprobs(logits: torch.Tensor, token_ids: Seq[int], num_top: Seq[int]) -> list[TokenLogprobs]:
    """For row i of logits [rows, vocab]: the log-probability of token_ids[i] and of the num_top[i] best, best first.

    As clients see them: of the model's own distribution, before bias, penalties, temperature and cuts. That is what the
    OpenAI API documents and vLLM returns by default, and the only choice under which the values of a token do not
    depend on how it was chosen.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    index = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen: list[float] = logprobs.gather(1, index).squeeze(1).tolist()
    most = min(max(num_top), logits.shape[1])
    if not most:
        return [TokenLogprobs(value) for value in chosen]
    best = logprobs.topk(most, dim=-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprobs(chosen[i], tuple(zip(tokens[i][:count], values[i][:count], strict=True)))
        for i, count in enumerate(num_top)
    ]


def _choose(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    greedy = [i for i, draw in enumerate(draws) if _is_greedy(draw)]
    random = [i for i, draw in enumerate(draws) if not _is_greedy(draw)]
    edited = _edited(logits, draws)
    if not random:
        best: list[int] = best_tokens(edited).tolist()
        return best
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logits.device)
    if greedy:
        tokens[greedy] = best_tokens(edited[greedy])
    drawn = [draws[i] for i in random]
    keys = draw_keys([d.seq.sampling.seed for d in drawn], [d.sample for d in drawn], [d.position for d in drawn])
    rows = edited[random] if greedy else edited
    tokens[random] = draw_tokens(rows, [d.seq.sampling for d in drawn], keys)
    chosen: list[int] = tokens.tolist()
    return chosen


def _is_greedy(draw: Draw) -> bool:
    return draw.seq.sampling.temperature < LEAST_TEMPERATURE


def _edited(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    """[len(draws), vocab]: each draw's row with its edits; the very same tensor when there is nothing to do."""
    rows = [draw.row for draw in draws]
    own = logits if rows == list(range(logits.shape[0])) else logits[rows]
    changing = [i for i, draw in enumerate(draws) if needs_edits(draw.seq)]
    if not changing:
        return own
    changed = own[changing]  # a copy
    edit_logits(changed, [draws[i].seq for i in changing])
    if len(changing) == len(draws):
        return changed
    own = own.clone() if own is logits else own
    own[changing] = changed
    return own
