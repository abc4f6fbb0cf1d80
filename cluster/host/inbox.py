"""What the engine thread has been told and has not read yet. Requests in it are capped; nothing else may be refused.

The engine thread reads between two steps. While one is long, an ingress could put in any number of prompts that the
engine would refuse once it looked: those past the cap are refused on arrival. Ends of requests and words of the
transfer agent always enter; there are no more of them than of what they speak of.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass

from kvbaton.cluster.session.server import SubmitRefused
from kvbaton.engine.orders import Order, Submitted
from kvbaton.kvtransfer.messages import Failed, Granted, Landed, Offered, Released
from kvbaton.settings import Count, check


@dataclass(frozen=True, slots=True)
class Stop:
    """Ends the loop."""


@dataclass(frozen=True, slots=True)
class SnapshotWanted:
    """Asks for `StepSink.snapshot`."""


@dataclass(frozen=True, slots=True)
class AuditWanted:
    """Asks for `StepSink.audited`."""


Item = Order | Offered | Granted | Landed | Released | Failed
"""What the worker is told: orders, and events of the transfer agent."""

Message = Item | SnapshotWanted | AuditWanted | Stop


@dataclass(frozen=True, slots=True)
class InboxLimits:
    """Of unread requests: how many, and the tokens of their prompts. One longer than `max_tokens` enters alone."""

    max_requests: Count
    max_tokens: Count = 4 << 20

    def __post_init__(self) -> None:
        check(self)


class Inbox:
    """A queue with one reader. `submit` is called from one thread, `put` from any."""

    def __init__(self, limits: InboxLimits) -> None:
        self._limits = limits
        self._queue: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Each pair has one writer, so that neither thread waits for the other: put in, and taken out.
        self._requests_in = self._tokens_in = 0
        self._requests_out = self._tokens_out = 0

    @property
    def requests(self) -> int:
        """Requests that nobody has read."""
        return self._requests_in - self._requests_out

    def submit(self, item: Submitted) -> None:
        """Put a request in. Raises `SubmitRefused` past the limits."""
        requests, tokens = self.requests, self._tokens_in - self._tokens_out
        size, limits = _tokens(item), self._limits
        if requests >= limits.max_requests:
            raise SubmitRefused(f"engine inbox is full ({requests} requests)")
        if requests and tokens + size > limits.max_tokens:
            raise SubmitRefused(f"engine inbox is full ({tokens} prompt tokens, {limits.max_tokens} allowed)")
        self._requests_in += 1
        self._tokens_in += size
        self._queue.put(item)

    def put(self, message: Message) -> None:
        """Put in anything but a request."""
        self._queue.put(message)

    def get(self, timeout_s: float) -> Message | None:
        """The next message; None when none comes in time (0: when there is none)."""
        try:
            message = self._queue.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        if isinstance(message, Submitted):
            self._requests_out += 1
            self._tokens_out += _tokens(message)
        return message


def _tokens(item: Submitted) -> int:
    return len(item.submit.request.prompt) + len(item.submit.request.emitted)
