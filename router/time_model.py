"""How long an engine takes, in one small class: seconds a prompt token, seconds a decode step.

Both start from a guess and follow what is observed by an exponential moving average. To be replaced by a fitted model
without any change in the policy: `prefill_s` and `step_s` are all that the policy asks.
"""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.2  # share of a new observation
_FULL_WEIGHT_TOKENS = 256  # a shorter prompt's time is mostly overhead and says little of the rate
_MAX_JUMP = 8.0  # an observation counts as at most this many times the present value, so one stall misleads nobody


@dataclass(slots=True)
class TimeModel:
    """Rates of one engine. `step_per_sequence_s` is how much each further sequence adds to a decode step."""

    prefill_s_per_token: float = 1e-3
    decode_step_s: float = 20e-3
    step_per_sequence_s: float = 0.2e-3

    def prefill_s(self, tokens: int) -> float:
        """Seconds to compute `tokens` prompt tokens that are not cached."""
        return tokens * self.prefill_s_per_token

    def step_s(self, running: int) -> float:
        """Seconds of one decode step with `running` sequences, from the steps seen with about as many."""
        return self.decode_step_s + running * self.step_per_sequence_s

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """`tokens` prompt tokens, the ones queued before included, took `seconds` until the first output token."""
        if tokens > 0 and seconds > 0:
            weight = min(1.0, tokens / _FULL_WEIGHT_TOKENS)
            self.prefill_s_per_token = _follow(self.prefill_s_per_token, seconds / tokens, weight)

    def observe_step(self, running: int, seconds: float) -> None:
        """A decode step with `running` sequences took `seconds`."""
        if running > 0 and seconds > 0:
            floor_s = max(seconds - running * self.step_per_sequence_s, seconds / 2)
            self.decode_step_s = _follow(self.decode_step_s, floor_s, 1.0)


def _follow(present: float, observed: float, weight: float) -> float:
    return present + weight * _SMOOTHING * (min(observed, _MAX_JUMP * present) - present)
