"""One engine as a service: weights and KV pool, step thread, transfer agent, session server, registry entry. No Ray.

    ingress ── session server (event loop) ──> step loop (engine thread) ──> outputs back, one frame per ingress a step
    peer    ── transfer agent (its own thread) ──> events into the same inbox
    store   <── registration (a beat a second), prefix events

Only the step loop's thread touches sequences and blocks; the event loop and the agent's thread exchange values with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field, replace

from kvbaton.cluster.host.inbox import AuditWanted, SnapshotWanted
from kvbaton.cluster.host.step_loop import StepCounters, StepLoop
from kvbaton.cluster.host.worker import Worker
from kvbaton.cluster.session.server import SessionServer
from kvbaton.cluster.store.prefix_feed import PrefixPublisher
from kvbaton.cluster.store.registry import Registration
from kvbaton.cluster.store.store import Store
from kvbaton.engine.config import EngineConfig
from kvbaton.engine.engine import Engine, configure_threads
from kvbaton.engine.kv.block_owners import BlockAudit
from kvbaton.engine.kv.kv_manager import CacheEvent, CacheSnapshot
from kvbaton.engine.orders import Abort, Evacuate, Migrate, MigrationOrdered, Notice, Submit, Submitted
from kvbaton.engine.request import TokenOutput
from kvbaton.kvtransfer.agent import TransferAgent
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.messages import Event
from kvbaton.kvtransfer.stats import TransferStats
from kvbaton.kvtransfer.ucx import UcxTransport
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role

log = logging.getLogger(__name__)

DRAIN_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class EngineHostSpec:
    """`secret` is shared by all engines and ingresses of a cluster; `host` is where both sockets listen. An engine with
    a step that takes longer than `step_limit_s` counts as hanging."""

    engine_id: str
    generation: int
    role: Role
    engine: EngineConfig
    step_limit_s: float
    secret: bytes = field(repr=False)
    host: str = "127.0.0.1"
    model_id: str = "model"
    transfer: TransferConfig = field(default_factory=TransferConfig)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for operators; nothing decides by it."""

    info: EngineInfo
    load: EngineLoad
    counters: StepCounters
    transfer: TransferStats
    requests: int


class EngineHost:
    """Start, serve, change role, stop. All methods run on one event loop."""

    def __init__(self, spec: EngineHostSpec, store: Store) -> None:
        self._spec = spec
        self._store = store
        self._parts: _Parts | None = None
        self._failure: asyncio.Future[str] | None = None
        self._stepped = asyncio.Event()
        self._audits: list[asyncio.Future[BlockAudit]] = []
        self._watch: asyncio.Task[None] | None = None
        self._failing = False

    async def start(self) -> EngineInfo:
        """Load the weights, listen on two free ports, register. Raises `ConfigError`, `StoreUnavailable`, `OSError`."""
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        configure_threads(self._spec.engine.threads)
        engine = await asyncio.to_thread(Engine.load, self._spec.engine)
        self._parts = await _assemble(self, engine, self._spec, self._store)
        self._watch = asyncio.create_task(self._watch_steps(self._parts.steps), name="step-watch")
        log.info("engine %s generation %d is ready", self._spec.engine_id, self._spec.generation)
        return self._parts.registration.info

    async def set_role(self, role: Role) -> None:
        """Announce a new role. Requests in progress go on: an engine can do both roles' work at any time."""
        parts = self._started()
        await parts.registration.update(replace(parts.registration.info, role=role))

    async def stats(self) -> EngineStats:
        parts = self._started()
        return EngineStats(
            info=parts.registration.info,
            load=parts.steps.load,
            counters=parts.steps.counters,
            transfer=parts.agent.stats(),
            requests=parts.worker.num_requests,
        )

    async def audit(self) -> BlockAudit:
        """Every block by its owner, as the engine thread finds it between two steps."""
        parts = self._started()
        answer: asyncio.Future[BlockAudit] = asyncio.get_running_loop().create_future()
        self._audits.append(answer)
        parts.steps.inbox.put(AuditWanted())
        return await answer

    async def migrate(self, request_id: str | None, to: str | None = None) -> None:
        """Have the ingresses migrate a running request (None: all) to the engine `to`, or where they like. Returns at
        once: the requests are served wherever they are, and go on here if no migration succeeds."""
        self._started().steps.inbox.put(Evacuate(request_id, to))

    async def drain(self) -> None:
        """Take nothing new, have everything that runs migrated away, and return when the engine is empty. The registry
        says DRAINING until another state is published; its ingresses act on that."""
        parts = self._started()
        info = replace(parts.registration.info, state=EngineState.DRAINING, reason="draining")
        await parts.registration.update(info)
        while not parts.worker.empty():
            self._stepped.clear()
            with contextlib.suppress(TimeoutError):  # an offer that nobody wanted ends without a step
                await asyncio.wait_for(self._stepped.wait(), DRAIN_LOOK_S)

    async def failed(self) -> str:
        """Returns, with the reason, when the engine can serve no longer though its process lives."""
        if self._failure is None:
            raise RuntimeError("the engine has not started")
        return await asyncio.shield(self._failure)

    async def stop(self) -> None:
        """Leave the registry, end sessions, threads and sockets. Requests in progress are cut off."""
        parts, self._parts = self._parts, None
        if parts is None:
            return
        if self._watch is not None:
            self._watch.cancel()
        await parts.registration.stop()
        await parts.prefixes.stop()
        await parts.sessions.close()
        await asyncio.to_thread(parts.steps.stop, 0.0 if self._failing else None)  # one that hangs is not waited for
        await asyncio.to_thread(parts.agent.close)

    def _started(self) -> _Parts:
        if self._parts is None:
            raise RuntimeError("the engine has not started")
        return self._parts

    # ---- SessionHandler, on the event loop ------------------------------------------------------------------------

    def submit(self, session_id: int, submit: Submit) -> None:
        self._started().steps.inbox.submit(Submitted(session_id, submit))

    def abort(self, session_id: int, request_id: str, sample: int | None) -> None:
        self._started().steps.inbox.put(Abort(session_id, request_id, sample))

    def migrate_sample(self, session_id: int, order: Migrate) -> None:
        self._started().steps.inbox.put(MigrationOrdered(session_id, order))

    def session_lost(self, session_id: int) -> None:
        if self._parts is not None:
            self._parts.steps.inbox.put(Abort(session_id, None))

    def stepped(self) -> None:
        """The engine thread has published."""
        self._stepped.set()

    def audited(self, audit: BlockAudit) -> None:
        for answer in self._audits:
            if not answer.done():
                answer.set_result(audit)
        self._audits.clear()

    async def fail(self, reason: str) -> None:
        """The engine thread died or hangs: say so, and cut every connection, so that ingresses resume elsewhere and
        peers give back what they hold for this engine, at once."""
        parts = self._started()
        if self._failing:
            return
        self._failing = True
        log.error("engine %s has failed: %s", self._spec.engine_id, reason)
        closing = asyncio.create_task(asyncio.to_thread(parts.agent.close))
        await parts.sessions.close()
        await parts.registration.update(replace(parts.registration.info, state=EngineState.UNHEALTHY, reason=reason))
        await closing
        if self._failure is not None:
            self._failure.set_result(reason)

    async def _watch_steps(self, steps: StepLoop) -> None:
        limit_s = self._spec.step_limit_s
        while True:
            left_s = limit_s - steps.busy_s()
            if left_s < 0:
                await self.fail(f"a step has not returned for {limit_s - left_s:.1f} s")
                return
            await asyncio.sleep(max(0.01, left_s / 2))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a started engine is made of."""

    worker: Worker
    steps: StepLoop
    agent: TransferAgent
    sessions: SessionServer
    prefixes: PrefixPublisher
    registration: Registration


class _Publisher:
    """Brings what the engine thread has to say to the event loop, one hop a step. Satisfies `StepSink`."""

    def __init__(self, host: EngineHost, sessions: SessionServer, prefixes: PrefixPublisher) -> None:
        self._host = host
        self._sessions = sessions
        self._prefixes = prefixes
        self._loop = asyncio.get_running_loop()

    def stepped(self, outputs: dict[int, list[TokenOutput]], load: EngineLoad) -> None:
        self._loop.call_soon_threadsafe(self._send, outputs, load)

    def notices(self, notices: list[tuple[int, Notice]]) -> None:
        self._loop.call_soon_threadsafe(self._notify, notices)

    def audited(self, audit: BlockAudit) -> None:
        self._loop.call_soon_threadsafe(self._host.audited, audit)

    def cached(self, events: list[CacheEvent]) -> None:
        self._loop.call_soon_threadsafe(self._prefixes.add, events)

    def snapshot(self, snapshot: CacheSnapshot) -> None:
        self._loop.call_soon_threadsafe(self._prefixes.snapshot, snapshot)

    def crashed(self, error: BaseException) -> None:
        asyncio.run_coroutine_threadsafe(self._host.fail(_died(error)), self._loop)

    def _notify(self, notices: list[tuple[int, Notice]]) -> None:
        for session_id, notice in notices:
            self._sessions.notify(session_id, notice)

    def _send(self, outputs: dict[int, list[TokenOutput]], load: EngineLoad) -> None:
        for session_id, tokens in outputs.items():
            self._sessions.publish(session_id, tokens, load)
        if not outputs:
            self._sessions.publish_load(load)
        self._host.stepped()


def _died(error: BaseException) -> str:
    return f"engine thread died: {type(error).__name__}: {error}"


class _EventSink:
    """The way into the step loop for parts that are made before it. Thread-safe."""

    def __init__(self) -> None:
        self.steps: StepLoop | None = None

    def __call__(self, event: Event) -> None:
        if self.steps is not None:
            self.steps.inbox.put(event)

    def want_snapshot(self) -> None:
        if self.steps is not None:
            self.steps.inbox.put(SnapshotWanted())


async def _assemble(host: EngineHost, engine: Engine, spec: EngineHostSpec, store: Store) -> _Parts:
    sink = _EventSink()
    agent = TransferAgent(
        memory=engine.cache,
        identity=spec,
        transport=UcxTransport(engine.cache, spec.host, cuda_device=engine.cache.pool.device.index),
        secret=spec.secret,
        compatibility=engine.compatibility(),
        settings=spec.transfer,
        on_event=sink,
        clock=time.monotonic,
    )
    worker = Worker(engine, agent, engine.limits)
    sessions = SessionServer(host, spec.host, 0, spec.secret, spec.engine_id, spec.generation)
    prefixes = PrefixPublisher(store, spec.engine_id, spec.generation, sink.want_snapshot)
    steps = StepLoop(worker, _Publisher(host, sessions, prefixes))
    sink.steps = steps
    sessions.publish_load(steps.load)  # an engine that has not stepped yet has a pool all the same
    agent.start()
    steps.start()
    prefixes.start()
    session_port = await sessions.start()
    info = EngineInfo(
        engine_id=spec.engine_id,
        generation=spec.generation,
        role=spec.role,
        state=EngineState.READY,
        host=spec.host,
        session_port=session_port,
        kv_port=agent.address().port,
        model_id=spec.model_id,
        max_model_len=engine.max_model_len,
        block_size=engine.geometry.block_size,
        num_blocks=engine.kv.num_blocks,
        prefill_chunk_tokens=engine.limits.chunk_tokens,
        max_requests=worker.max_requests,
    )
    registration = Registration(store, info)
    await registration.start()
    return _Parts(worker, steps, agent, sessions, prefixes, registration)
