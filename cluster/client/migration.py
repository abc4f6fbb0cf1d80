"""Samples that move from one decode engine to another while they stream: the ingress's half.

    start ──> MOVE leg at the target, MOVE order at the source ──> the target's tokens begin where the source's end
      the source says moved, or the target sends the token that is next     the sample is the target's
      the source says that it goes on                                       the target's leg is aborted
      the target is lost                                                    the source goes on if it can, and says so
      the source is lost, or the sample ends                                both legs end; a lost one is resumed

The target's tokens may overtake the source's last ones, which come over another connection: they wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from kvbaton.cluster.client.live_request import Attempt, Flight, SampleMove, resume_request
from kvbaton.cluster.client.settings import ClientConfig, ClientCounters
from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.cluster.session.types import Leg, Move, Moved, Submit
from kvbaton.engine.request import FinishReason, TokenOutput
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.router import Router

log = logging.getLogger(__name__)

_RETRY_S = 0.25
_MAX_TRIES = 4


class MoveRefused(RuntimeError):
    """A sample that cannot be moved now, and why."""


class MoveHost(Protocol):
    """What moves need of the client."""

    config: ClientConfig
    router: Router
    counters: ClientCounters

    @property
    def attempts(self) -> Iterable[Attempt]: ...

    def session(self, info: EngineInfo) -> SessionClient:
        """Raises `SessionLost`."""
        ...

    def register(self, attempt: Attempt) -> None: ...

    def forget(self, attempt: Attempt) -> None: ...

    def accept(self, attempt: Attempt, session: SessionClient, output: TokenOutput) -> None:
        """Take an output of the engine that a sample is at."""
        ...

    def move_elsewhere(self, attempt: Attempt, sample: int, reason: str, counted: bool) -> None:
        """Compute a sample anew at another engine; `counted` as one of its resumes."""
        ...


class ClientMoves:
    """Every move of this ingress. Lives on the client's event loop."""

    def __init__(self, host: MoveHost) -> None:
        self._host = host
        self._open: dict[str, SampleMove] = {}  # by the request id of the target's leg

    def __len__(self) -> int:
        return len(self._open)

    def start(self, flight: Flight, index: int, to: EngineInfo) -> SampleMove:
        """Begin. Raises `MoveRefused`, `SessionLost`; the outcome is the move's `done`: why it failed, or ""."""
        sample = flight.samples[index]
        source = sample.attempt
        if source is None or sample.done or sample.move is not None:
            raise MoveRefused("the sample is not at one engine")
        if not source.decodes(index):
            raise MoveRefused("its prompt is still being computed")
        if source.second.info.engine_id == to.engine_id:
            raise MoveRefused(f"it is at {to.engine_id} already")
        session = self._host.session(to)
        flight.epoch += 1
        request = resume_request(flight, index)
        booking = self._host.router.book_move(request, to)
        target = Attempt(flight, request, session, session, booking, {index}, standby=True)
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        move = SampleMove(index, source, target, done)
        self._host.register(target)
        self._open[request.request_id] = sample.move = move
        session.submit(Submit(request, Leg.MOVE, _address(source.second.info)))
        source.second.move(_order(move, _address(to)))
        return move

    def output(self, target: Attempt, session: SessionClient, output: TokenOutput) -> None:
        """A word of a target whose sample is not its own yet."""
        move = self._open.get(target.request.request_id)
        if move is None:
            return
        if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
            self._target_lost(move, output.error or str(output.finish))
            return
        expected = len(target.flight.samples[move.sample].tokens)
        if output.index == expected:
            self._switch(move, tell_source=True)
            self._host.accept(target, session, output)
        elif output.index > expected and (not move.ahead or output.index == move.ahead[-1].index + 1):
            move.ahead.append(output)

    def told(self, session: SessionClient, moved: Moved) -> None:
        """A source's last word about a move."""
        move = self._open.get(moved.new_id)
        if move is None or move.source.second is not session or move.target.request.epoch != moved.new_epoch:
            return
        if not moved.moved:
            self._end(move, move.target_lost or moved.reason or "the source goes on")
        elif move.target_lost:
            reason = f"moved to {move.target.second.info.engine_id}, which was lost"
            self._end(move, reason)
            self._host.move_elsewhere(move.source, move.sample, reason, counted=True)
        else:
            ahead = move.ahead
            self._switch(move, tell_source=False)
            for output in ahead:
                self._host.accept(move.target, move.target.second, output)
            move.target.flight.wake()

    def lost(self, session: SessionClient) -> None:
        """A connection is gone, and with it the targets there."""
        for move in list(self._open.values()):
            if move.target.second is session:
                self._target_lost(move, f"engine {session.info.engine_id} was lost")

    def call_off(self, flight: Flight, index: int, reason: str) -> None:
        """The sample ends, or is resumed: its move, if there is one, is not wanted any more."""
        move = flight.samples[index].move
        if move is not None:
            self._end(move, reason)

    def drain(self, session: SessionClient) -> None:
        """Move away what decodes at an engine that drains, a few at a time. Called with each of its frames."""
        engine_id = session.info.engine_id
        busy = sum(move.source.second is session for move in self._open.values())
        now = asyncio.get_running_loop().time()
        for attempt in [a for a in self._host.attempts if a.second is session and not a.standby]:
            for index in sorted(attempt.unfinished):
                sample = attempt.flight.samples[index]
                if busy >= self._host.config.max_moves:
                    return
                if sample.move is not None or now < sample.retry_move_at or not attempt.decodes(index):
                    continue
                to = self._host.router.place_move(len(attempt.flight.request.prompt) + len(sample.tokens), engine_id)
                if to is None:
                    return
                sample.retry_move_at = now + _RETRY_S * 2**sample.move_tries
                sample.move_tries += 1
                busy += 1
                if sample.move_tries > _MAX_TRIES:
                    self._host.move_elsewhere(attempt, index, f"engine {engine_id} drains", counted=False)
                    continue
                try:
                    self.start(attempt.flight, index, to)
                except (MoveRefused, SessionLost) as error:
                    log.info("request %s: not moved yet: %s", attempt.request.request_id, error)

    def _switch(self, move: SampleMove, tell_source: bool) -> None:
        source, target = move.source, move.target
        sample = target.flight.samples[move.sample]
        self._close(move, "")
        target.standby = False
        sample.attempt, sample.early, sample.move_tries = target, [], 0
        self._host.counters.moved += 1
        if tell_source:
            source.abort((move.sample,))
        source.unfinished.discard(move.sample)
        if not source.unfinished:
            self._host.forget(source)

    def _target_lost(self, move: SampleMove, reason: str) -> None:
        """Only the source knows whether the sample had left it."""
        if not move.target_lost:
            log.warning("request %s: its move to %s failed: %s", *_names(move), reason)
            move.target_lost = reason or "it was lost"
            move.source.second.move(_order(move, None))
            self._host.forget(move.target)

    def _end(self, move: SampleMove, reason: str) -> None:
        self._close(move, reason)
        self._host.counters.moves_failed += 1
        move.source.second.move(_order(move, None))
        if not move.target_lost:
            move.target.abort()
            self._host.forget(move.target)

    def _close(self, move: SampleMove, outcome: str) -> None:
        del self._open[move.target.request.request_id]
        move.target.flight.samples[move.sample].move = None
        if not move.done.done():
            move.done.set_result(outcome)


def _order(move: SampleMove, to: PeerAddress | None) -> Move:
    request = move.target.request
    return Move(
        move.source.request.request_id, move.sample, to, request.request_id, request.epoch, len(request.context)
    )


def _address(info: EngineInfo) -> PeerAddress:
    return PeerAddress(info.engine_id, info.generation, info.host, info.kv_port)


def _names(move: SampleMove) -> tuple[str, str]:
    return move.source.request.request_id, move.target.second.info.engine_id
