"""What an engine refuses when it is submitted, before it costs anything."""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.engine.request import Request


@dataclass(frozen=True, slots=True)
class SubmitCheck:
    """`max_tokens` bounds prompt and completion, `max_requests` those that wait or run."""

    max_tokens: int
    vocab_size: int
    max_requests: int

    def refusal(self, request: Request, num_requests: int) -> str | None:
        """Why the engine will not take `request` beside the `num_requests` that it has; None if it does."""
        tokens = len(request.context)
        if not 0 < tokens < self.max_tokens:
            return f"prompt of {tokens} tokens; this engine takes 1 to {self.max_tokens - 1}"
        if not 0 <= min(request.context) <= max(request.context) < self.vocab_size:
            return f"token id out of vocabulary (0 to {self.vocab_size - 1})"
        if num_requests >= self.max_requests:
            return f"engine queue is full ({num_requests} requests)"
        return None
