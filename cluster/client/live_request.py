"""One client request on its way: its samples, the engines that work on it now, and what waits to be read.

    LiveRequest   what `generate` streams from: a queue of outputs, an end, or an error
    Sample        one sample's tokens in order: what came early waits, what came twice is dropped, a gap is an error
    Attempt       one submission of some of the samples to one or two engines; replaced when it fails

With a pair, a sample's first token comes from prefill and the others from decode, over two connections: decode's may
overtake the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol

from msgspec import structs

from kvbaton.engine.orders import Migrate, Submit
from kvbaton.engine.request import ErrorCause, FinishReason, Request, TokenOutput
from kvbaton.router.engine_info import EngineInfo
from kvbaton.router.router import Booking

_FAILURES = (FinishReason.ERROR, FinishReason.ABORT)


class EngineSession(Protocol):
    """The way to one engine incarnation; what it says back comes as `LinkEvents`. A `SessionClient`, or a test's."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def connected(self) -> bool: ...

    def submit(self, submit: Submit) -> None:
        """Raises `SessionLost` where the session is gone: nothing was sent."""
        ...

    def abort(self, request_id: str, sample: int | None = None) -> None:
        """Have a request forgotten, or one sample of it. Without a session there is nothing to forget."""
        ...

    def migrate(self, order: Migrate) -> None:
        """Have a sample migrated, or stop that. Without a session nothing is sent."""
        ...


class Timers(Protocol):
    """Time in seconds, and calls at a later time: the event loop's, or moved by a test."""

    def now(self) -> float: ...

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:
        """Returns what cancels it."""
        ...


class LoopTimers:
    """`Timers` of the running event loop."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Callable[[], None]:
        return asyncio.get_running_loop().call_later(delay_s, call).cancel


class TokenGap(RuntimeError):
    """A token came whose predecessor can no longer come."""


@dataclass(frozen=True, slots=True)
class SampleFailure:
    """Why a sample cannot go on where it is. `queue_full`: it had not begun there, and nothing is wrong."""

    reason: str
    queue_full: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    """`first` computes the prompt, `second` decodes, the same one where there is no transfer."""

    live: LiveRequest
    request: Request  # as the engines know it
    first: EngineSession
    second: EngineSession
    booking: Booking
    unfinished: set[int]
    decoding: bool = False  # the decode leg has sent a token: the hand-off is behind us
    standby: bool = False  # its sample migrates to it, and is still another attempt's

    @property
    def base(self) -> int:
        """Index of the first token that this attempt makes for each sample."""
        return len(self.request.emitted)

    @property
    def paired(self) -> bool:
        return self.first is not self.second

    def makes(self, index: int) -> bool:
        """Whether the next token of this sample is to come from here."""
        sample = self.live.samples.get(index)
        return sample is not None and sample.attempt is self

    def decodes(self, index: int) -> bool:
        """Whether `second` has the prompt and makes this sample's tokens, as far as one can see from here."""
        return self.decoding if self.paired else len(self.live.samples[index].tokens) > self.base

    def needing(self, session: EngineSession) -> set[int]:
        """The samples that cannot go on without this session: once decode is at work, prefill owes at most a first
        token that decode has overtaken."""
        if session is self.second:
            return set(self.unfinished)
        if session is not self.first:
            return set()
        samples = self.live.samples
        return {i for i in self.unfinished if not self.decoding or len(samples[i].tokens) == self.base}

    def abort(self, samples: Iterable[int] | None = None) -> None:
        """Tell both legs to drop these samples, or all."""
        for session in {id(leg): leg for leg in (self.first, self.second)}.values():
            if samples is None:
                session.abort(self.request.request_id)
            else:
                for sample in samples:
                    session.abort(self.request.request_id, sample)


@dataclass(slots=True, eq=False)
class ClientMigration:
    """A sample on its way from `source`'s engine to `target`'s. `done` tells why it failed, None if it did not."""

    sample: int
    source: Attempt
    target: Attempt
    done: asyncio.Future[str | None]
    ahead: list[TokenOutput] = field(default_factory=list)  # the target's, which overtook the source's last ones
    target_lost: str | None = None  # why the target will not take it; only the source knows whether it had gone before


@dataclass(slots=True)
class Sample:
    """Tokens of one sample so far. `attempt` makes the next one; None while none does."""

    tokens: list[int] = field(default_factory=list)
    done: bool = False
    attempt: Attempt | None = None
    early: list[TokenOutput] = field(default_factory=list)
    migration: ClientMigration | None = None
    migration_tries: int = 0
    retry_migration_at: float = 0.0

    def accept(self, output: TokenOutput, ready: list[TokenOutput]) -> None:
        """Put an output in its place; append to `ready` what can be read now. Raises `TokenGap`."""
        expected = len(self.tokens)
        if output.index == expected:
            self._take(output, ready)
            early, self.early = self.early, []
            for waiting in early:
                self._take(waiting, ready)
        elif output.index > expected:
            self._keep_early(output, expected)

    def _take(self, output: TokenOutput, ready: list[TokenOutput]) -> None:
        if self.done:
            return
        if output.token_id is not None:
            self.tokens.append(output.token_id)
        self.done = output.finish is not None
        ready.append(output)

    def _keep_early(self, output: TokenOutput, expected: int) -> None:
        """Only decode may run ahead, only of the one token that prefill still owes, and without holes."""
        attempt = self.attempt
        if attempt is None or not attempt.paired or expected != attempt.base:
            raise TokenGap(f"token {output.index} came where {expected} was next")
        following = expected + 1 + len(self.early)
        if output.index > following:
            raise TokenGap(f"token {output.index} came where {following} was next")
        if output.index == following:
            self.early.append(output)


class LiveRequest:
    """Everything about one request between `generate` and its end. Lives on one event loop."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.samples = {index: Sample(list(request.emitted)) for index in request.sample_indices}
        self.epoch = request.epoch
        self.resumes = 0
        self.last_reason = ""  # of a failure, for the message of the error if there is no further try
        self.parked: list[int] = []  # samples that wait for an engine to come
        self.turned_away: set[int] = set()  # samples that an engine had no room for, and none has taken since
        self.waits_for_room = False  # what is parked waits for a place, not for an engine
        self.wait_ends_s: float | None = None  # of a request that waits for room without a token
        self.cancel_park: Callable[[], None] | None = None  # the end of their wait
        self.deadline_s: float | None = None  # when the request's time is up, on the clock of `Timers`
        self.cancel_deadline: Callable[[], None] | None = None
        self._ready: list[TokenOutput] = []
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    @property
    def over(self) -> bool:
        """Nothing more will come: each sample is done, or the request failed."""
        return self._error is not None or all(sample.done for sample in self.samples.values())

    @property
    def begun(self) -> bool:
        """Whether the client has any token."""
        before = len(self.request.emitted)
        return any(len(sample.tokens) > before for sample in self.samples.values())

    @property
    def attempts(self) -> list[Attempt]:
        """The live ones, each once."""
        found = {id(s.attempt): s.attempt for s in self.samples.values() if s.attempt is not None}
        return list(found.values())

    def cancel_wait(self) -> None:
        """Nothing is parked any more."""
        if self.cancel_park is not None:
            self.cancel_park()
        self.cancel_park = None

    def cancel_timers(self) -> None:
        for cancel in (self.cancel_park, self.cancel_deadline):
            if cancel is not None:
                cancel()
        self.cancel_park = self.cancel_deadline = None

    def accept(self, attempt: Attempt, session: EngineSession, output: TokenOutput) -> SampleFailure | None:
        """Take one output of an attempt. Returns why the sample has to be resumed, if it has to. Raises `TokenGap`."""
        sample = self.samples.get(output.sample)
        if sample is None or sample.done or not attempt.makes(output.sample):
            return None
        if output.finish in _FAILURES:
            if output.sample not in attempt.needing(session):
                return None  # prefill complains of a hand-off that decode has completed
            reason = f"engine {session.info.engine_id}: {output.error or output.finish}"
            return SampleFailure(reason, output.cause is ErrorCause.QUEUE_FULL)
        if session is attempt.second and attempt.paired and output.index > attempt.base:
            attempt.decoding = True
        sample.accept(self._as_client_knows_it(output), self._ready)
        return None

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what is ready."""
        self._error = self._error or error
        self.wake()

    def wake(self) -> None:
        """Let the reader look: something is ready, or it is over."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def read(self) -> list[TokenOutput]:
        """What has arrived since, at least one output; the empty list at the end. Raises what `fail` was given."""
        while True:
            if self._ready:
                ready, self._ready = self._ready, []
                return ready
            if self._error is not None:
                raise self._error
            if self.over:
                return []
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def _as_client_knows_it(self, output: TokenOutput) -> TokenOutput:
        """A resumed sample runs under a name of its own and recomputes a prompt whose numbers the client has."""
        if output.request_id == self.request.request_id:
            return output
        first = output.index == len(self.request.emitted)
        return structs.replace(
            output,
            request_id=self.request.request_id,
            cached_tokens=output.cached_tokens if first else None,
            prompt_logprobs=output.prompt_logprobs if first else None,
        )


def resume_request(live: LiveRequest, index: int, now: float) -> Request:
    """A new request for one sample, which goes on where its tokens end. `epoch` of `live` makes its name unique."""
    request, tokens = live.request, tuple(live.samples[index].tokens)
    sampling = structs.replace(request.sampling, prompt_logprobs=None) if tokens else request.sampling
    return replace(
        request,
        request_id=f"{request.request_id}~{live.epoch}.{index}",
        sampling=sampling,
        sample_indices=(index,),
        emitted=tokens,
        epoch=live.epoch,
        timeout_s=None if live.deadline_s is None else max(0.001, live.deadline_s - now),
    )
