"""The cluster as one engine: `generate` places a request, merges the tokens of its engines, and survives their loss.

    place ──> submit to both legs at once ──> outputs of both connections, put in order ──> end, or
      ^                                                                                      aclose: abort on both legs
      ├── an engine drains, or somebody asks: a sample moves to another decode engine (`client_moves`)
      └── an engine is lost, reports an error, or a token is missing: abort the legs, resume each unfinished sample with
          what it has as `emitted`, on other engines, `max_resumes` times; with no engine at all wait `park_s` for one

Randomness is keyed by (seed, position), so a resumed sample draws the tokens that it would have drawn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from kvbaton.cluster.client_config import ClientConfig, ClientCounters
from kvbaton.cluster.client_flight import Attempt, Flight, TokenGap, resume_request
from kvbaton.cluster.client_links import EngineLinks
from kvbaton.cluster.client_moves import ClientMoves, MoveRefused
from kvbaton.cluster.client_types import Cancelled, DeadlineExceeded, EngineLost, NoEngines, Overloaded
from kvbaton.cluster.registry import Membership
from kvbaton.cluster.session_client import SessionClient, SessionLost
from kvbaton.cluster.session_requests import check_sendable
from kvbaton.cluster.session_types import Leg, Moved, Notice, Submit
from kvbaton.engine.request import InvalidRequest, Request, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.placement import Local, Placement, Refused, Unavailable
from kvbaton.router.router import Router

log = logging.getLogger(__name__)


__all__ = ["ClientConfig", "ClientCounters", "ClusterClient"]


class ClusterClient:
    """A `GenerationClient` over the engines of a membership list. One per ingress process, on one event loop."""

    def __init__(
        self,
        membership: Membership,
        router: Router,
        secret: bytes,
        ingress_id: str,
        config: ClientConfig | None = None,
    ) -> None:
        self.config = config or ClientConfig()
        self.router = router
        self.counters = ClientCounters()
        self._membership = membership
        self._links = EngineLinks(secret, ingress_id, self, self.config.limits)
        self._flights: dict[str, Flight] = {}
        self._closing = False
        self._attempts: dict[str, Attempt] = {}  # by the request id that the engines know
        self._links_changed = asyncio.Event()
        self._draining: set[str] = set()
        self.moves = ClientMoves(self)

    async def start(self) -> None:
        """Follow the membership list, which the caller starts and closes; connecting goes on in the background."""
        self._membership.subscribe(self._links.set_engines)

    async def close(self) -> None:
        """Abort what is in flight and end every session."""
        self._closing = True
        for flight in list(self._flights.values()):
            self._abandon(flight)
            flight.fail(EngineLost("the ingress stops"))
        await self._links.close()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    # -- GenerationClient --

    async def generate(self, request: Request) -> AsyncIterator[list[TokenOutput]]:
        """See `GenerationClient`."""
        check_sendable(request)
        if request.request_id in self._flights:
            raise InvalidRequest(f"a request with id {request.request_id!r} is in flight")
        if len(self._flights) >= self.config.max_in_flight:
            self.counters.refused += 1
            raise Overloaded(f"{len(self._flights)} requests are in flight at this ingress", 1.0)
        timeout_s = request.timeout_s or self.config.request_timeout_s
        flight = Flight(request if timeout_s is None else replace(request, timeout_s=timeout_s))
        self._flights[request.request_id] = flight
        timer = None if timeout_s is None else self._start_timer(flight, timeout_s)
        try:
            self._begin(flight)
            while outputs := await flight.read():
                yield outputs
        finally:
            if timer is not None:
                timer.cancel()
            del self._flights[request.request_id]
            self._abandon(flight)

    def cancel(self, request_id: str) -> bool:
        """End a request of this ingress, in whatever state it is: its stream fails with `Cancelled`. False if there is
        no such request."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        self._abandon(flight)
        flight.fail(Cancelled("the request was cancelled"))
        return True

    async def migrate(self, request_id: str, sample: int, to: str) -> str:
        """Move a sample that decodes to the engine `to`. Returns why it stayed where it was, or an empty string.
        Raises `MoveRefused` where it cannot begin, `SessionLost`."""
        flight = self._flights.get(request_id)
        view = self.router.view(to)
        if flight is None or sample not in flight.samples or view is None:
            raise MoveRefused("no such request" if view is not None else f"no engine {to}")
        return await asyncio.shield(self.moves.start(flight, sample, view.info).done)

    def finish_sample(self, request_id: str, sample: int) -> None:
        """See `GenerationClient`. Unknown ids and samples that are done are fine."""
        flight = self._flights.get(request_id)
        held = None if flight is None else flight.samples.get(sample)
        if flight is None or held is None or held.done:
            return
        held.done = True
        self.moves.call_off(flight, sample, "the sample is done")
        if held.attempt is not None:
            held.attempt.abort((sample,))
            self._sample_done(held.attempt, sample)
        flight.wake()

    def ready(self) -> bool:
        """See `GenerationClient`. A role that no engine in the list has is served by the others: no need to wait."""
        connected = {info.role for info in self.router.engines if info.state is EngineState.READY}
        listed = {info.role for info in self._membership.engines if info.state is not EngineState.UNHEALTHY}
        if not connected:
            return False
        missing = {Role.PREFILL, Role.DECODE} - connected
        return Role.HYBRID in connected or not (missing & listed)

    async def wait_ready(self) -> None:
        """Returns when `ready` is true; there is no limit but the caller's."""
        while not self.ready():
            await self._links_changed.wait()

    # -- LinkEvents --

    def connected(self, session: SessionClient, info: EngineInfo, load: EngineLoad) -> None:
        self.router.add(info)
        self._note_draining(info)
        self.router.observe(info.engine_id, load)
        self._tell_links_changed()

    def changed(self, info: EngineInfo) -> None:
        self.router.add(info)
        self._note_draining(info)
        self._tell_links_changed()

    def _note_draining(self, info: EngineInfo) -> None:
        """With its next frames its samples begin to move away."""
        if info.state is EngineState.DRAINING:
            self._draining.add(info.engine_id)
        else:
            self._draining.discard(info.engine_id)

    def _tell_links_changed(self) -> None:
        self._links_changed.set()
        self._links_changed = asyncio.Event()
        self._retry_parked()

    def removed(self, engine_id: str) -> None:
        self._draining.discard(engine_id)
        self.router.remove(engine_id)

    def step(self, session: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None:
        """One engine step: sort its tokens into their flights, then wake each reader once."""
        self.router.observe(session.info.engine_id, load)
        touched: dict[int, Flight] = {}
        failed: list[tuple[Attempt, int, str]] = []
        for output in outputs:
            attempt = self._attempts.get(output.request_id)
            if attempt is None or output.epoch != attempt.request.epoch:
                self.counters.stale_outputs += 1
                continue
            if attempt.standby:
                self.moves.output(attempt, session, output)
                touched[id(attempt)] = attempt.flight
                continue
            reason = self._accept(attempt, session, output)
            if reason is not None:
                failed.append((attempt, output.sample, reason))
            touched[id(attempt)] = attempt.flight
        self._settle_failures(failed, session)
        for flight in touched.values():
            flight.wake()
        if session.info.engine_id in self._draining:
            self.moves.drain(session)

    def notice(self, session: SessionClient, notice: Notice) -> None:
        """An engine's word about a move, or its wish for one."""
        if isinstance(notice, Moved):
            self.moves.told(session, notice)
            return
        attempt = self._attempts.get(notice.request_id)
        if attempt is None or attempt.second is not session or attempt.standby:
            return
        for index in sorted(attempt.unfinished):
            self._move_if_possible(attempt, index, notice.to)

    def _move_if_possible(self, attempt: Attempt, index: int, to: str) -> None:
        source = attempt.second.info.engine_id
        view = self.router.view(to)
        target = view.info if view is not None else None
        if not to:
            target = self.router.place_move(len(attempt.request.context), source)
        try:
            if target is None:
                raise MoveRefused(f"no engine {to}")
            self.moves.start(attempt.flight, index, target)
        except (MoveRefused, SessionLost) as error:
            log.warning("request %s: not moved from %s: %s", attempt.request.request_id, source, error)

    def lost(self, session: SessionClient, reason: str) -> None:
        """Resume what depended on this engine."""
        engine_id = session.info.engine_id
        log.log(logging.INFO if self._closing else logging.WARNING, "engine %s: session lost: %s", engine_id, reason)
        view = self.router.view(engine_id)
        if view is not None and view.info.generation == session.info.generation:
            self.router.unreachable(engine_id)
        self.moves.lost(session)
        for attempt in [attempt for attempt in self._attempts.values() if not attempt.standby]:
            self._fail(attempt, attempt.needing(session), f"engine {engine_id}: {reason}", frozenset((engine_id,)))

    # -- the life of a flight --

    def _begin(self, flight: Flight) -> None:
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
            legs = [(first, Submit(request, Leg.LOCAL))]
        else:
            self.counters.placed_pairs += 1
            first, second = self.session(placement.prefill), self.session(placement.decode)
            legs = [
                (second, Submit(request, Leg.DECODE, _address(placement.prefill))),
                (first, Submit(request, Leg.PREFILL, _address(placement.decode))),
            ]
        booking = self.router.book(request, placement)
        attempt = Attempt(flight, request, first, second, booking, set(request.sample_indices))
        self._attempts[request.request_id] = attempt
        for index in request.sample_indices:
            flight.samples[index].attempt = attempt
        for session, submit in legs:
            session.submit(submit)

    # -- MoveHost --

    @property
    def attempts(self) -> Iterable[Attempt]:
        return self._attempts.values()

    def register(self, attempt: Attempt) -> None:
        self._attempts[attempt.request.request_id] = attempt

    def accept(self, attempt: Attempt, session: SessionClient, output: TokenOutput) -> None:
        """An output outside of a step's batch."""
        reason = self._accept(attempt, session, output)
        if reason is not None:
            self._settle_failures([(attempt, output.sample, reason)], session)

    def move_elsewhere(self, attempt: Attempt, sample: int, reason: str, counted: bool) -> None:
        attempt.flight.resumes -= not counted
        self._fail(attempt, {sample}, reason, frozenset((attempt.second.info.engine_id,)))

    def session(self, info: EngineInfo) -> SessionClient:
        session = self._links.session(info)
        if session is None:
            raise SessionLost(f"engine {info.engine_id}: no session")
        return session

    def _accept(self, attempt: Attempt, session: SessionClient, output: TokenOutput) -> str | None:
        """Returns why the sample has to be resumed, if it has to."""
        try:
            reason = attempt.flight.accept(attempt, session, output)
        except TokenGap as gap:
            return str(gap)
        if attempt.booking.prefilling:
            self.router.first_token(attempt.booking)
        if output.finish is not None and attempt.flight.samples[output.sample].done:
            self._sample_done(attempt, output.sample)
        return reason

    def _sample_done(self, attempt: Attempt, sample: int) -> None:
        """With its last sample an attempt is over; a decode leg that never got to decode is told."""
        attempt.unfinished.discard(sample)
        self.moves.call_off(attempt.flight, sample, "the sample is done")
        if attempt.unfinished:
            return
        if attempt.paired and not attempt.decoding:
            attempt.second.abort(attempt.request.request_id)
        self.forget(attempt)

    def _settle_failures(self, failed: Iterable[tuple[Attempt, int, str]], session: SessionClient) -> None:
        grouped: dict[int, tuple[Attempt, set[int], str]] = {}
        for attempt, sample, reason in failed:
            grouped.setdefault(id(attempt), (attempt, set(), reason))[1].add(sample)
        for attempt, samples, reason in grouped.values():
            engines = frozenset((attempt.first.info.engine_id, attempt.second.info.engine_id))
            self._fail(attempt, samples & attempt.unfinished, reason, engines)

    def _fail(self, attempt: Attempt, samples: set[int], reason: str, avoid: frozenset[str]) -> None:
        """End an attempt for some of its samples (maybe none) and go on elsewhere, if not done too often."""
        if not samples:
            return
        flight = attempt.flight
        flight.resumes += 1
        flight.last_reason = reason
        log.warning("request %s: samples %s to be resumed: %s", attempt.request.request_id, sorted(samples), reason)
        for index in samples:
            self.moves.call_off(flight, index, reason)
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

    def _retry_parked(self) -> None:
        for flight in [flight for flight in self._flights.values() if flight.parked]:
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
        self._abandon(flight)
        flight.fail(EngineLost(f"{why}; last failure: {flight.last_reason}"))

    def _abandon(self, flight: Flight) -> None:
        """Release all that a flight holds anywhere: abort its live attempts on both legs."""
        flight.parked = []
        if flight.deadline is not None:
            flight.deadline.cancel()
            flight.deadline = None
        for index in flight.samples:
            self.moves.call_off(flight, index, "the request is over")
        for attempt in flight.attempts:
            if attempt.unfinished:
                attempt.abort()
                self.forget(attempt)

    def _start_timer(self, flight: Flight, timeout_s: float) -> asyncio.TimerHandle:
        loop = asyncio.get_running_loop()
        flight.overdue_at = loop.time() + timeout_s
        return loop.call_later(timeout_s, self._time_is_up, flight, timeout_s)

    def _time_is_up(self, flight: Flight, timeout_s: float) -> None:
        if not flight.over:
            self.counters.timed_out += 1
            self._abandon(flight)
            flight.fail(DeadlineExceeded(f"not done within {timeout_s:g} s"))

    def forget(self, attempt: Attempt) -> None:
        self._attempts.pop(attempt.request.request_id, None)
        self.router.release(attempt.booking)
        for sample in attempt.flight.samples.values():
            if sample.attempt is attempt:
                sample.attempt = None


def _address(info: EngineInfo) -> PeerAddress:
    return PeerAddress(info.engine_id, info.generation, info.host, info.kv_port)
