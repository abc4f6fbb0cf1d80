"""What one engine knows of each request that it works on: who asked, which leg it is, and the sequences it became."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import ErrorCause, Request, TokenLogprobs
from kvbaton.engine.sequence import Sequence
from kvbaton.kvtransfer.messages import HandoffKey


@dataclass(slots=True)
class Leg:
    """One engine's part of a request. `prompt` is the sequence that computes the prompt, until its first tokens are
    drawn; `live` are the samples that decode here afterwards."""

    session_id: int
    submit: Submit
    prompt: Sequence | None = None
    live: dict[int, Sequence] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)  # samples aborted before they were live here
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    overdue_at_s: float = math.inf

    @property
    def request(self) -> Request:
        return self.submit.request

    @property
    def kind(self) -> LegKind:
        return self.submit.kind

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.request.request_id, self.request.epoch)


@dataclass(frozen=True, slots=True)
class Ending:
    """A leg that cannot go on. `error` is told to its ingress; None where it knows, or another leg tells it."""

    leg: Leg
    error: str | None
    cause: ErrorCause | None = None


class Legs:
    """Legs by hand-off key, and by session for the day an ingress is lost."""

    def __init__(self) -> None:
        self._by_key: dict[HandoffKey, Leg] = {}
        self._deadlines: list[tuple[float, str, int]] = []  # a heap; may name requests that are gone

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._by_key

    def add(self, leg: Leg) -> None:
        self._by_key[leg.key] = leg
        if leg.overdue_at_s < math.inf:
            heapq.heappush(self._deadlines, (leg.overdue_at_s, leg.key.request_id, leg.key.epoch))

    def overdue(self, now: float) -> list[Leg]:
        """Legs whose time is up, each once."""
        late: list[Leg] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id, epoch = heapq.heappop(self._deadlines)
            leg = self.get(HandoffKey(request_id, epoch))
            if leg is not None and leg.overdue_at_s <= now:
                late.append(leg)
        return late

    def get(self, key: HandoffKey) -> Leg | None:
        return self._by_key.get(key)

    def of(self, seq: Sequence) -> Leg:
        """The leg of a sequence that runs here. Raises `KeyError` for one whose leg has ended: a bug."""
        return self._by_key[HandoffKey(seq.request.request_id, seq.request.epoch)]

    def remove(self, leg: Leg) -> None:
        self._by_key.pop(leg.key, None)

    def named(self, request_id: str | None) -> list[Leg]:
        """All legs of a request id, whoever submitted it; all there are for None."""
        return [leg for leg in self if request_id is None or leg.request.request_id == request_id]

    def of_request(self, session_id: int, request_id: str | None) -> list[Leg]:
        """All epochs of a request that one session submitted here (normally one); all of its requests for None."""
        return [leg for leg in self.named(request_id) if leg.session_id == session_id]
