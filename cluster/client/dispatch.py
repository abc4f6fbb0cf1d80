"""Where the samples of requests are at work: placed, submitted, resumed elsewhere, parked, given up.

begin ──> place ──> submit to both legs ──> take outputs ──> done
            ^                                   │
            └── fail: abort, resume each unfinished sample with what it has; parked while there is no engine
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from kvbaton.cluster.client.api import DeadlineExceeded, EngineLost, NoEngines, Overloaded
from kvbaton.cluster.client.live_request import Attempt, Flight, TokenGap, resume_request
from kvbaton.cluster.client.migration import ClientMigrations
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import Request, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.placement import Local, Placement, Refused, Unavailable
from kvbaton.router.router import Router

log = logging.getLogger(__name__)


class Dispatch:
    """Every attempt of one ingress; a `MigrationHost`. `find_session` gives the open connection to an engine."""

    def __init__(
        self,
        config: ClientConfig,
        router: Router,
        counters: ClientCounters,
        find_session: Callable[[EngineInfo], SessionClient | None],
    ) -> None:
        self.config = config
        self.router = router
        self.counters = counters
        self.by_id: dict[str, Attempt] = {}  # by the request id that the engines know
        self.migrations = ClientMigrations(self)
        self._find_session = find_session

    def begin(self, flight: Flight) -> None:
        request = flight.request
        decision = self.router.place(request)
        if isinstance(decision, Refused):
            self.counters.refused += 1
            raise Overloaded(decision.reason, decision.retry_after_s)
        if isinstance(decision, Unavailable):
            raise NoEngines(decision.reason)
        try:
            self._submit(flight, request, decision)
        except SessionLost as error:
            flight.last_reason = str(error)
            self._resume(flight, list(request.sample_indices), frozenset())

    def _submit(self, flight: Flight, request: Request, placement: Placement) -> None:
        """Send both legs. Raises `SessionLost`, with nothing noted or sent, where a session has just gone."""
        if isinstance(placement, Local):
            self.counters.placed_local += 1
            first = second = self.session(placement.engine)
            legs = [(first, Submit(request, LegKind.LOCAL))]
        else:
            self.counters.placed_pairs += 1
            first, second = self.session(placement.prefill), self.session(placement.decode)
            legs = [
                (second, Submit(request, LegKind.DECODE, _address(placement.prefill))),
                (first, Submit(request, LegKind.PREFILL, _address(placement.decode))),
            ]
        booking = self.router.book(request, placement)
        attempt = Attempt(flight, request, first, second, booking, set(request.sample_indices))
        self.by_id[request.request_id] = attempt
        for index in request.sample_indices:
            flight.samples[index].attempt = attempt
        for session, submit in legs:
            session.submit(submit)

    # -- MigrationHost --

    @property
    def attempts(self) -> Iterable[Attempt]:
        return self.by_id.values()

    def register(self, attempt: Attempt) -> None:
        self.by_id[attempt.request.request_id] = attempt

    def accept(self, attempt: Attempt, session: SessionClient, output: TokenOutput) -> None:
        """An output outside of a step's batch."""
        reason = self.take(attempt, session, output)
        if reason is not None:
            self.settle_failures([(attempt, output.sample, reason)], session)

    def resume_elsewhere(self, attempt: Attempt, sample: int, reason: str, counted: bool) -> None:
        attempt.flight.resumes -= not counted
        self.fail(attempt, {sample}, reason, frozenset((attempt.second.info.engine_id,)))

    def session(self, info: EngineInfo) -> SessionClient:
        session = self._find_session(info)
        if session is None:
            raise SessionLost(f"engine {info.engine_id}: no session")
        return session

    def take(self, attempt: Attempt, session: SessionClient, output: TokenOutput) -> str | None:
        """Returns why the sample has to be resumed, if it has to."""
        try:
            reason = attempt.flight.accept(attempt, session, output)
        except TokenGap as gap:
            return str(gap)
        if attempt.booking.prefilling:
            self.router.first_token(attempt.booking)
        if output.finish is not None and attempt.flight.samples[output.sample].done:
            self.sample_done(attempt, output.sample)
        return reason

    def sample_done(self, attempt: Attempt, sample: int) -> None:
        """With its last sample an attempt is over; a decode leg that never got to decode is told."""
        attempt.unfinished.discard(sample)
        self.migrations.call_off(attempt.flight, sample, "the sample is done")
        if attempt.unfinished:
            return
        if attempt.paired and not attempt.decoding:
            attempt.second.abort(attempt.request.request_id)
        self.forget(attempt)

    def settle_failures(self, failed: Iterable[tuple[Attempt, int, str]], session: SessionClient) -> None:
        grouped: dict[int, tuple[Attempt, set[int], str]] = {}
        for attempt, sample, reason in failed:
            grouped.setdefault(id(attempt), (attempt, set(), reason))[1].add(sample)
        for attempt, samples, reason in grouped.values():
            engines = frozenset((attempt.first.info.engine_id, attempt.second.info.engine_id))
            self.fail(attempt, samples & attempt.unfinished, reason, engines)

    def fail(self, attempt: Attempt, samples: set[int], reason: str, avoid: frozenset[str]) -> None:
        """End an attempt for some of its samples (maybe none) and go on elsewhere, if not done too often."""
        if not samples:
            return
        flight = attempt.flight
        flight.resumes += 1
        flight.last_reason = reason
        log.warning("request %s: samples %s to be resumed: %s", attempt.request.request_id, sorted(samples), reason)
        for index in samples:
            self.migrations.call_off(flight, index, reason)
        attempt.abort(None if samples == attempt.unfinished else samples)
        attempt.unfinished -= samples
        for index in samples:
            flight.samples[index].attempt = None
            flight.samples[index].early = []
        if not attempt.unfinished:
            self.forget(attempt)
        if flight.resumes > self.config.max_resumes:
            self._give_up(flight, f"resumed {self.config.max_resumes} times")
        else:
            self._resume(flight, sorted(samples), avoid)

    def retry_parked(self, flights: Iterable[Flight]) -> None:
        for flight in [flight for flight in flights if flight.parked]:
            parked, flight.parked = flight.parked, []
            self._resume(flight, parked, frozenset())

    def _resume(self, flight: Flight, indices: list[int], avoid: frozenset[str]) -> None:
        """Submit each of these samples anew; they are parked while no engine can take them."""
        flight.epoch += 1
        for index in indices:
            if flight.samples[index].done:
                continue
            request = resume_request(flight, index)
            decision = self.router.place(request, avoid, admit=False)
            if isinstance(decision, Refused | Unavailable):
                self._park(flight, index)
                continue
            self.counters.resumed += 1
            try:
                self._submit(flight, request, decision)
            except SessionLost:
                self._park(flight, index)

    def _park(self, flight: Flight, index: int) -> None:
        flight.parked.append(index)
        if flight.deadline is None:
            reason = f"no engine came within {self.config.park_s:g} s"
            loop = asyncio.get_running_loop()
            flight.deadline = loop.call_later(self.config.park_s, self._park_over, flight, reason)

    def _park_over(self, flight: Flight, reason: str) -> None:
        flight.deadline = None
        if flight.parked:
            self._give_up(flight, reason)

    def _give_up(self, flight: Flight, why: str) -> None:
        self.counters.lost += 1
        self.abandon(flight)
        flight.fail(EngineLost(f"{why}; last failure: {flight.last_reason}"))

    def abandon(self, flight: Flight) -> None:
        """Release all that a flight holds anywhere: abort its live attempts on both legs."""
        flight.parked = []
        if flight.deadline is not None:
            flight.deadline.cancel()
            flight.deadline = None
        for index in flight.samples:
            self.migrations.call_off(flight, index, "the request is over")
        for attempt in flight.attempts:
            if attempt.unfinished:
                attempt.abort()
                self.forget(attempt)

    def start_timer(self, flight: Flight, timeout_s: float) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        flight.overdue_at = loop.time() + timeout_s
        return loop.call_later(timeout_s, self._time_is_up, flight, timeout_s)

    def _time_is_up(self, flight: Flight, timeout_s: float) -> None:
        if not flight.over:
            self.counters.timed_out += 1
            self.abandon(flight)
            flight.fail(DeadlineExceeded(f"not done within {timeout_s:g} s"))

    def forget(self, attempt: Attempt) -> None:
        self.by_id.pop(attempt.request.request_id, None)
        self.router.release(attempt.booking)
        for sample in attempt.flight.samples.values():
            if sample.attempt is attempt:
                sample.attempt = None


def _address(info: EngineInfo) -> PeerAddress:
    return PeerAddress(info.engine_id, info.generation, info.host, info.kv_port)
