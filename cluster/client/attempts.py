"""The table of attempts: which engines work on which samples, over which sessions, and what the router booked for it.

    connected, lost       the sessions to engines, as the links tell
    submit, migrate       an attempt begins: booked with the router, noted here, sent to its engines
    end                   it is over for all of its samples: forgotten here, its booking released

Dispatch and migrations both stand on it. Whoever ends an attempt tells its engines first (`Attempt.abort`).
"""

from __future__ import annotations

from collections.abc import Iterator

from kvbaton.cluster.client.live_request import Attempt, EngineSession, LiveRequest
from kvbaton.cluster.session.client import SessionLost
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import Request
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.placement import Local, Placement
from kvbaton.router.router import Router


class Attempts:
    """Every live attempt of one ingress, by the request id that the engines know. Iterating gives the attempts."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._sessions: dict[str, EngineSession] = {}  # by engine id
        self._by_id: dict[str, Attempt] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(list(self._by_id.values()))  # what is done for one of them may end another

    def get(self, request_id: str) -> Attempt | None:
        return self._by_id.get(request_id)

    def working_on(self, request_id: str, sample: int) -> Attempt | None:
        """The attempt that makes the next token of a sample; `request_id` is the client's."""
        of_request = (attempt for attempt in self if attempt.live.request.request_id == request_id)
        return next((attempt for attempt in of_request if attempt.makes(sample)), None)

    def connected(self, session: EngineSession) -> None:
        self._sessions[session.info.engine_id] = session

    def lost(self, session: EngineSession) -> None:
        """Submit nothing there any more. Attempts that depend on it are for the caller to end."""
        if self._sessions.get(session.info.engine_id) is session:
            del self._sessions[session.info.engine_id]

    def submit(self, live: LiveRequest, request: Request, placement: Placement) -> Attempt:
        """Send `request`, which is `live` or some of its samples, to one engine or to two. Raises `SessionLost`, with
        nothing noted or sent, where a session has just gone."""
        if isinstance(placement, Local):
            first = second = self._session(placement.engine)
            legs = [(first, Submit(request, LegKind.LOCAL))]
        else:
            first, second = self._session(placement.prefill), self._session(placement.decode)
            legs = [
                (second, Submit(request, LegKind.DECODE, address_of(placement.prefill))),
                (first, Submit(request, LegKind.PREFILL, address_of(placement.decode))),
            ]
        booking = self._router.book(request, placement)
        attempt = Attempt(live, request, first, second, booking, set(request.sample_indices))
        self._by_id[request.request_id] = attempt
        for index in request.sample_indices:
            live.samples[index].attempt = attempt
        for session, submit in legs:
            session.submit(submit)
        return attempt

    def migrate(self, live: LiveRequest, request: Request, source: EngineInfo, to: EngineInfo) -> Attempt:
        """Have `to` wait for one sample of `live` that `source` decodes: an attempt on standby. Raises `SessionLost`,
        with nothing noted or sent."""
        session = self._session(to)
        booking = self._router.book_migration(request, to)
        attempt = Attempt(live, request, session, session, booking, set(request.sample_indices), standby=True)
        self._by_id[request.request_id] = attempt
        session.submit(Submit(request, LegKind.MIGRATION, address_of(source)))
        return attempt

    def first_token(self, attempt: Attempt) -> None:
        """Its prompt is computed. May be called more than once."""
        if attempt.booking.prefilling:
            self._router.first_token(attempt.booking)

    def handed_over(self, attempt: Attempt) -> None:
        """Its decode engine decodes. May be called more than once."""
        if attempt.booking.handing_over:
            self._router.handed_over(attempt.booking)

    def end(self, attempt: Attempt) -> None:
        """Forget it, wherever it stands. May be called more than once."""
        self._by_id.pop(attempt.request.request_id, None)
        self._router.release(attempt.booking)
        for sample in attempt.live.samples.values():
            if sample.attempt is attempt:
                sample.attempt = None

    def _session(self, info: EngineInfo) -> EngineSession:
        """The session to exactly this incarnation. Raises `SessionLost`."""
        session = self._sessions.get(info.engine_id)
        if session is None or not session.connected or session.info.generation != info.generation:
            raise SessionLost(f"engine {info.engine_id}: no session")
        return session


def address_of(info: EngineInfo) -> PeerAddress:
    """Where the engine's peers reach it."""
    return PeerAddress(info.engine_id, info.generation, info.host, info.kv_port)
