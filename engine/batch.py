"""What a scheduler hands to the engine for one step, how that lies in a forward pass, and what comes back.

No padding anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvbaton.engine.request import TokenLogprobs
from kvbaton.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Run the next `num_tokens` tokens of one sequence, from `start` on.

    `ahead` tokens before them belong to a step that has been launched and has not landed: what it computes is not in
    `seq.num_computed` yet, and the token that it draws for a decode row is not in `seq.tokens`.

    `samples` are the sample indices to draw from the logits of the last of these tokens: one for a decode row, all of
    the request's for the last chunk of a prompt, none for an inner chunk. The sequence's block table already covers
    the new tokens, and every block written here has exactly one holder.
    """

    seq: Sequence
    num_tokens: int
    samples: tuple[int, ...]
    ahead: int = 0

    @property
    def start(self) -> int:
        """Position of the row's first token; true until the step before it lands."""
        return self.seq.num_computed + self.ahead


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Scheduled rows cut into the pieces of one forward pass (`kernels.meta`).

        row 0: prompt 30..33, generated 34 and 35      row 1: generated 50
        tokens  [ row 0 @ 34 | row 0 @ 35 | row 1 @ 50 | row 0 @ 30 31 32 33 ]      num_decodes = 3

    A position of the request's prompt goes as prompt, in a piece of one token too, and a generated one as a decode of
    its own, also where several are computed at once because a stream is resumed or was preempted. So how a token is
    computed follows from its position alone, and its KV and logits are the same to the last bit whatever it travels
    with, wherever the products are. It costs a resume one reading of the context for each token that it had emitted.
    """

    owners: list[int]  # the row of each piece
    starts: list[int]  # the position of each piece's first token
    lens: list[int]
    num_decodes: int
    last: list[int]  # where in the pass each row's last token is

    @classmethod
    def of(cls, rows: list[ScheduledRow]) -> BatchLayout:
        owners: list[int] = []
        starts: list[int] = []
        prompts: list[tuple[int, int, int]] = []
        last = [0] * len(rows)
        for i, row in enumerate(rows):
            start, num_prompt = row.start, row.seq.num_prompt
            end = start + row.num_tokens
            if start < num_prompt:
                prompts.append((i, start, min(end, num_prompt)))
            for position in range(max(start, num_prompt), end):
                owners.append(i)
                starts.append(position)
            last[i] = len(owners) - 1
        num_decodes = at = len(owners)
        lens = [1] * num_decodes
        for i, start, end in prompts:
            owners.append(i)
            starts.append(start)
            lens.append(end - start)
            at += end - start
            if end - start == rows[i].num_tokens:
                last[i] = at - 1
        return cls(owners, starts, lens, num_decodes, last)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Per scheduled row, in order: a sampled token per entry of `row.samples`; and, for rows of a request with
    `prompt_logprobs`, that *token's own* log-probability for each token of the row (None for position 0).

    `redrawn` are rows whose token was drawn on the host at the end: a row of the next step that was launched before
    read something else in its place, and nothing of it may be used."""

    sampled: list[tuple[SampledToken, ...]]
    prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None]
    redrawn: tuple[int, ...] = ()


class Pending(Protocol):
    """A step on its way."""

    def wait(self) -> StepResult:
        """Blocks until the device is through with it. Called once, in the order of launches."""
        ...
