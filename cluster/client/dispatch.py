"""What becomes of the samples of live requests: placed, submitted, resumed elsewhere, parked, given up.

begin ──> place ──> submit to both legs ──> take outputs ──> done
            ^                                   │
            └── fail: abort, resume each unfinished sample with what it has; parked while there is no engine

An output of a sample that migrates, and what an engine says of a migration, goes to `ClientMigrations`; what its answer
demands for the sample is done here. A request ends by `end` whatever the reason is: both legs of each attempt are told.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from kvbaton.cluster.client.api import DeadlineExceeded, EngineLost, NoEngines, Overloaded, ServiceError
from kvbaton.cluster.client.attempts import Attempts
from kvbaton.cluster.client.live_request import (
    Attempt,
    EngineSession,
    LiveRequest,
    SampleFailure,
    Timers,
    TokenGap,
    resume_request,
)
from kvbaton.cluster.client.migration import ClientMigrations, Recompute
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.client import SessionLost
from kvbaton.engine.orders import Migrated, Notice
from kvbaton.engine.request import Request, TokenOutput
from kvbaton.router.placement import Placement, Refused, Unavailable
from kvbaton.router.router import Router

log = logging.getLogger(__name__)


class Dispatch:
    """The requests of one ingress on their way through its engines. Lives on one event loop."""

    def __init__(
        self,
        config: ClientConfig,
        router: Router,
        attempts: Attempts,
        migrations: ClientMigrations,
        counters: ClientCounters,
        timers: Timers,
    ) -> None:
        self._config = config
        self._router = router
        self._attempts = attempts
        self._migrations = migrations
        self._counters = counters
        self._timers = timers
        self._parked: dict[int, LiveRequest] = {}  # those with parked samples, by identity

    # -- a request begins and ends --

    def begin(self, live: LiveRequest) -> None:
        """Place and submit a new request. Its time, where it has a limit, runs from here on. Raises `Overloaded` and
        `NoEngines`."""
        request = live.request
        decision = self._router.place(request)
        if isinstance(decision, Refused):
            self._counters.refused += 1
            raise Overloaded(decision.reason, decision.retry_after_s)
        if isinstance(decision, Unavailable):
            raise NoEngines(decision.reason)
        if request.timeout_s is not None:
            live.deadline_s = self._timers.now() + request.timeout_s
            live.cancel_deadline = self._timers.call_later(request.timeout_s, partial(self._time_is_up, live))
        try:
            self._submit(live, request, decision)
        except SessionLost as error:
            live.last_reason = str(error)
            self._resume(live, list(request.sample_indices), frozenset())

    def end(self, live: LiveRequest, error: ServiceError | None = None) -> None:
        """Release all that a request holds anywhere: abort its live attempts on both legs. With an `error` its stream
        ends with that."""
        live.parked = []
        self._parked.pop(id(live), None)
        live.cancel_timers()
        for index in live.samples:
            self._migrations.call_off(live, index, "the request is over")
        for attempt in live.attempts:
            if attempt.unfinished:
                attempt.abort()
                self._attempts.end(attempt)
        if error is not None:
            live.fail(error)

    def finish_sample(self, live: LiveRequest, index: int) -> None:
        """Its reader needs no more tokens of a sample; one that is done, or not the request's, is fine."""
        sample = live.samples.get(index)
        if sample is None or sample.done:
            return
        sample.done = True
        self._migrations.call_off(live, index, "the sample is done")
        if sample.attempt is not None:
            sample.attempt.abort((index,))
            self._sample_done(sample.attempt, index)
        live.wake()

    # -- what engines say --

    def step(self, session: EngineSession, outputs: list[TokenOutput]) -> None:
        """The tokens of one engine step: each goes to its request, then each reader is woken once."""
        touched: dict[int, LiveRequest] = {}
        failed: list[tuple[Attempt, int, SampleFailure]] = []
        for output in outputs:
            attempt = self._attempts.get(output.request_id)
            if attempt is None or output.epoch != attempt.request.epoch:
                self._counters.stale_outputs += 1
                continue
            touched[id(attempt.live)] = attempt.live
            if attempt.standby:
                self._take_all(attempt, self._migrations.output(attempt, output))
                continue
            failure = self._take(attempt, session, output)
            if failure is not None:
                failed.append((attempt, output.sample, failure))
        self._settle_failures(failed)
        for live in touched.values():
            live.wake()
        if self._parked and self._router.has_room():
            self._retry_in_turn()

    def notice(self, session: EngineSession, notice: Notice) -> None:
        """An engine tells how a migration ended, or asks for one."""
        if isinstance(notice, Migrated):
            target = self._attempts.get(notice.new_id)
            outcome = self._migrations.told(session, notice)
            if isinstance(outcome, Recompute):
                self._recompute(outcome)
            elif target is not None:
                self._take_all(target, outcome)
            return
        attempt = self._attempts.get(notice.request_id)
        if attempt is not None and attempt.second is session and not attempt.standby:
            self._migrations.start_all(attempt, notice.to)

    def drain(self, session: EngineSession) -> None:
        """The engine drains: have some of what decodes there go on elsewhere. Called with each of its frames."""
        for stuck in self._migrations.drain(session):
            self._recompute(stuck)

    def lost(self, session: EngineSession, reason: str) -> None:
        """Resume what depended on this engine."""
        engine_id = session.info.engine_id
        self._attempts.lost(session)
        self._migrations.lost(session)
        for attempt in [attempt for attempt in self._attempts if not attempt.standby]:
            failure = SampleFailure(f"engine {engine_id}: {reason}")
            self._fail(attempt, attempt.needing(session), failure, frozenset((engine_id,)))

    def retry_parked(self) -> None:
        """An engine has come or changed: perhaps it takes those that found none."""
        for live in list(self._parked.values()):
            self._retry(live)

    def _retry_in_turn(self) -> None:
        """A request has ended somewhere: its place is for the first that waits."""
        for live in list(self._parked.values()):
            if not self._retry(live):
                return

    def _retry(self, live: LiveRequest) -> bool:
        """True when none of its samples waits any more; one that does keeps its turn."""
        parked, live.parked = live.parked, []
        self._resume(live, parked, frozenset())
        if not live.parked:
            self._parked.pop(id(live), None)
            live.cancel_wait()
        return not live.parked

    # -- attempts --

    def _submit(self, live: LiveRequest, request: Request, placement: Placement) -> None:
        """Raises `SessionLost`, with nothing noted or sent."""
        if self._attempts.submit(live, request, placement).paired:
            self._counters.placed_pairs += 1
        else:
            self._counters.placed_local += 1

    def _take(self, attempt: Attempt, session: EngineSession, output: TokenOutput) -> SampleFailure | None:
        """Returns why the sample has to be resumed, if it has to."""
        try:
            failure = attempt.live.accept(attempt, session, output)
        except TokenGap as gap:
            return SampleFailure(str(gap))
        if failure is not None and failure.queue_full:
            self._router.refused(session.info.engine_id)
            return failure
        self._attempts.first_token(attempt)
        if attempt.decoding:
            self._attempts.handed_over(attempt)
        if output.finish is not None and attempt.live.samples[output.sample].done:
            self._sample_done(attempt, output.sample)
        return failure

    def _take_all(self, target: Attempt, outputs: list[TokenOutput]) -> None:
        """Take those of a target's outputs that are its sample's now."""
        for output in outputs:
            failure = self._take(target, target.second, output)
            if failure is not None:
                self._settle_failures([(target, output.sample, failure)])
        target.live.wake()

    def _recompute(self, lost: Recompute) -> None:
        """Resume a sample that its migration has cost its engine."""
        lost.attempt.live.resumes -= not lost.counted
        engines = frozenset((lost.attempt.second.info.engine_id,))
        self._fail(lost.attempt, {lost.sample}, SampleFailure(lost.reason), engines)

    def _sample_done(self, attempt: Attempt, sample: int) -> None:
        """With its last sample an attempt is over; a decode leg that never got to decode is told."""
        attempt.unfinished.discard(sample)
        self._migrations.call_off(attempt.live, sample, "the sample is done")
        if attempt.unfinished:
            return
        if attempt.paired and not attempt.decoding:
            attempt.second.abort(attempt.request.request_id)
        self._attempts.end(attempt)

    def _settle_failures(self, failed: Iterable[tuple[Attempt, int, SampleFailure]]) -> None:
        """Fail each attempt once, for all of its samples that did."""
        grouped: dict[int, tuple[Attempt, set[int], SampleFailure]] = {}
        for attempt, sample, failure in failed:
            grouped.setdefault(id(attempt), (attempt, set(), failure))[1].add(sample)
        for attempt, samples, failure in grouped.values():
            engines = frozenset((attempt.first.info.engine_id, attempt.second.info.engine_id))
            self._fail(attempt, samples & attempt.unfinished, failure, engines)

    def _fail(self, attempt: Attempt, samples: set[int], failure: SampleFailure, avoid: frozenset[str]) -> None:
        """End an attempt for some of its samples (maybe none) and go on elsewhere, if not done too often. That an
        engine was full does not count."""
        if not samples:
            return
        live, reason = attempt.live, failure.reason
        live.resumes += not failure.queue_full
        if failure.queue_full:
            live.turned_away |= samples
        live.last_reason = reason
        level = logging.DEBUG if failure.queue_full else logging.WARNING
        log.log(level, "request %s: samples %s go elsewhere: %s", attempt.request.request_id, sorted(samples), reason)
        for index in samples:
            self._migrations.call_off(live, index, reason)
        attempt.abort(None if samples == attempt.unfinished else samples)
        attempt.unfinished -= samples
        for index in samples:
            live.samples[index].attempt = None
            live.samples[index].early = []
        if not attempt.unfinished:
            self._attempts.end(attempt)
        if live.resumes > self._config.max_resumes:
            self._give_up(live, f"resumed {self._config.max_resumes} times")
        else:
            self._resume(live, sorted(samples), avoid)

    def _resume(self, live: LiveRequest, indices: list[int], avoid: frozenset[str]) -> None:
        """Submit each of these samples anew; they are parked while no engine can take them."""
        live.epoch += 1
        for index in indices:
            if live.samples[index].done:
                continue
            request = resume_request(live, index, self._timers.now())
            decision = self._router.place(request, avoid, admit=False)
            live.waits_for_room = isinstance(decision, Refused)
            if isinstance(decision, Refused | Unavailable):
                self._park(live, index)
                continue
            self._counters.resumed += index not in live.turned_away
            live.turned_away.discard(index)
            try:
                self._submit(live, request, decision)
            except SessionLost:
                self._park(live, index)

    # -- ends that time brings --

    def _park(self, live: LiveRequest, index: int) -> None:
        live.parked.append(index)
        self._parked[id(live)] = live
        if live.cancel_park is None:
            live.cancel_park = self._timers.call_later(self._wait_s(live), partial(self._park_over, live))

    def _wait_s(self, live: LiveRequest) -> float:
        """A request without a token may come again: it waits for room only shortly, all its waits together."""
        if live.begun or not live.turned_away:
            return self._config.park_s
        now = self._timers.now()
        live.wait_ends_s = live.wait_ends_s or now + self._config.full_wait_s
        return max(0.0, live.wait_ends_s - now)

    def _park_over(self, live: LiveRequest) -> None:
        live.cancel_park = None
        if not live.parked:
            return
        if live.turned_away and not live.begun:
            self._counters.refused += 1
            self.end(live, Overloaded("the queue of every engine is full", self._config.full_wait_s))
        elif live.waits_for_room:  # the engines work, and its own time limit goes on
            live.cancel_park = self._timers.call_later(self._config.park_s, partial(self._park_over, live))
        else:
            self._give_up(live, f"no engine came within {self._config.park_s:g} s")

    def _give_up(self, live: LiveRequest, why: str) -> None:
        self._counters.lost += 1
        self.end(live, EngineLost(f"{why}; last failure: {live.last_reason}"))

    def _time_is_up(self, live: LiveRequest) -> None:
        if not live.over:
            self._counters.timed_out += 1
            self.end(live, DeadlineExceeded(f"not done within {live.request.timeout_s:g} s"))
