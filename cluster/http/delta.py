"""What one step of generation adds to an answer, and what the answer cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvbaton.engine.request import FinishReason, TokenLogprobs


class Delta(NamedTuple):
    """One step of one choice. A named tuple, not a dataclass: one is made per token."""

    choice: int
    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a call. `cached` of the `prompt` tokens were not computed again."""

    prompt: int
    completion: int
    cached: int
