"""Thin Ray shells round plain asyncio classes; the only file with `@ray.remote`.

    kvbaton-manager     ManagerActor   one, detached, restarted by Ray: takes over the engines that are up
    kvbaton-engine-N    EngineActor    detached, never restarted by Ray: the manager starts a new generation instead

Ray carries life-cycle calls only. Tokens and KV never pass through here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from kvbaton.cluster.host.engine_host import EngineHost, EngineHostSpec, EngineStats
from kvbaton.cluster.pools.manager import PoolManager, PoolView
from kvbaton.cluster.pools.state import StorePoolState
from kvbaton.cluster.pools.supervisor import Backoff, EngineFailed, EngineSpec
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.registry import Membership
from kvbaton.cluster.store.store import StoreAddress
from kvbaton.engine.kv.block_owners import BlockAudit
from kvbaton.router.engine_info import EngineInfo, Role

MANAGER_NAME = "kvbaton-manager"
ENGINE_PREFIX = "kvbaton-"  # + the engine's id, which is engine-N
MANAGER_CPUS = 0.01  # not 0: an actor that holds nothing makes its node look idle to an autoscaler
_SWITCH_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineResources:
    """What an engine asks of Ray. `environment` is set before its process starts."""

    num_cpus: float
    num_gpus: float
    start_timeout_s: float
    log_level: str
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ManagerSpec:
    """`template` is what every engine gets; id, generation and role are filled in for each."""

    store: StoreAddress
    template: EngineHostSpec
    resources: EngineResources
    backoff: Backoff = field(default_factory=Backoff)


def _log_to_stderr(level: str) -> None:
    """Ray keeps a file with the stderr of each actor."""
    logging.basicConfig(level=level.upper(), format=_LOG_FORMAT)


@ray.remote(max_restarts=0, max_task_retries=0)
class EngineActor:
    """One `EngineHost` in a process of its own."""

    def __init__(self, spec: EngineHostSpec, store: StoreAddress, log_level: str) -> None:
        _log_to_stderr(log_level)
        self._spec = spec
        self._address = store
        self._store: RedisStore | None = None
        self._host: EngineHost | None = None
        self._info: EngineInfo | None = None

    async def start(self) -> EngineInfo:
        """Load, listen, register. Raises what the host raises."""
        self._store = await RedisStore.open(self._address.url, self._address.namespace)
        spec = self._spec
        if not spec.host:  # the address under which the other nodes of the Ray cluster know this one
            spec = replace(spec, host=ray.util.get_node_ip_address())
        self._host = EngineHost(spec, self._store)
        self._info = await self._host.start()
        return self._info

    async def info(self) -> EngineInfo | None:
        """None until `start` has returned."""
        return self._info

    async def set_role(self, role: Role) -> EngineInfo:
        host, info = self._started()
        await host.set_role(role)
        self._info = replace(info, role=role)
        return self._info

    async def stats(self) -> EngineStats:
        host, _ = self._started()
        return await host.stats()

    async def audit(self) -> BlockAudit:
        """Every KV block by its owner."""
        host, _ = self._started()
        return await host.audit()

    async def migrate(self, request_id: str | None, to: str = "") -> None:
        """Have a running request (None: all) go on at another engine."""
        host, _ = self._started()
        await host.migrate(request_id, to)

    async def drain(self) -> None:
        """Returns when everything that ran here goes on elsewhere."""
        host, _ = self._started()
        await host.drain()

    async def run(self) -> str:
        """Returns the reason when the engine has failed inside a living process; the process' death raises here."""
        host, _ = self._started()
        return await host.failed()

    async def stop(self) -> None:
        if self._host is not None:
            await self._host.stop()
        if self._store is not None:
            await self._store.close()

    def _started(self) -> tuple[EngineHost, EngineInfo]:
        if self._host is None or self._info is None:
            raise RuntimeError("the engine has not started")
        return self._host, self._info


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=MANAGER_CPUS)
class ManagerActor:
    """One `PoolManager`. `start` may be called again, after a restart too."""

    def __init__(self, spec: ManagerSpec) -> None:
        _log_to_stderr(spec.resources.log_level)
        self._spec = spec
        self._manager: PoolManager | None = None

    async def start(self) -> PoolView:
        if self._manager is None:
            store = await RedisStore.open(self._spec.store.url, self._spec.store.namespace)
            membership = Membership(store)
            await membership.start()
            factory = RayEngineFactory(self._spec, membership)
            self._manager = PoolManager(factory, StorePoolState(store), WallClock(), self._spec.backoff)
            self._manager.start()
        return self._manager.view()

    async def changed(self, after: int) -> PoolView:
        """The view as soon as its version is above `after`."""
        await self.start()
        if self._manager is None:
            raise RuntimeError("the manager is stopping")
        return await self._manager.changed(after)

    async def stop(self) -> None:
        """End every engine."""
        if self._manager is not None:
            await self._manager.stop()


class WallClock:
    """`supervisor.Clock` by the machine's clock."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class RayEngine:
    """`supervisor.RunningEngine`: an engine actor that is up."""

    def __init__(self, actor: Any, info: EngineInfo, membership: Membership) -> None:
        self._actor = actor
        self._info = info
        self._membership = membership

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def set_role(self, role: Role) -> None:
        try:
            self._info = await asyncio.wait_for(self._actor.set_role.remote(role), _SWITCH_TIMEOUT_S)
        except (RayError, TimeoutError) as error:
            raise EngineFailed(reason_of(error)) from error

    async def died(self) -> str:
        """Of its process, as Ray sees it; of a failure inside that it reports itself; or of silence: one that hangs is
        alive to Ray."""
        running = asyncio.ensure_future(self._run())
        silent = asyncio.ensure_future(self._membership.left(self._info.engine_id, self._info.generation))
        try:
            await asyncio.wait((running, silent), return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            ray.kill(self._actor)  # it hangs: it would not answer a request to stop
            return "no heartbeat"
        finally:
            running.cancel()
            silent.cancel()

    async def _run(self) -> str:
        try:
            reason = str(await self._actor.run.remote())
        except RayError as error:
            return reason_of(error)
        await end_actor(self._actor)  # it failed inside a process that lives on
        return reason

    async def stop(self) -> None:
        await end_actor(self._actor)


class RayEngineFactory:
    """`supervisor.EngineFactory`: one detached actor an engine, so that engines survive their manager."""

    def __init__(self, spec: ManagerSpec, membership: Membership) -> None:
        self._spec = spec
        self._membership = membership

    async def start(self, spec: EngineSpec) -> RayEngine:
        actor = self._create(spec)
        try:
            info = await asyncio.wait_for(actor.start.remote(), self._spec.resources.start_timeout_s)
        except (RayError, TimeoutError) as error:
            ray.kill(actor)
            raise EngineFailed(reason_of(error)) from error
        except asyncio.CancelledError:
            ray.kill(actor)
            raise
        return RayEngine(actor, info, self._membership)

    async def existing(self) -> list[RayEngine]:
        """Engines that are up; one that a dead manager left half started is killed."""
        found: list[RayEngine] = []
        for name in ray.util.list_named_actors():
            if not name.startswith(f"{ENGINE_PREFIX}engine-"):
                continue
            actor = ray.get_actor(name)
            try:
                info = await asyncio.wait_for(actor.info.remote(), _STOP_TIMEOUT_S)
            except (RayError, TimeoutError) as error:
                log.warning("%s does not answer: %s", name, reason_of(error))
                info = None
            if info is None:
                ray.kill(actor)
            else:
                found.append(RayEngine(actor, info, self._membership))
        return found

    def _create(self, spec: EngineSpec) -> Any:
        host = replace(self._spec.template, engine_id=spec.engine_id, generation=spec.generation, role=spec.role)
        resources = self._spec.resources
        try:
            return EngineActor.options(  # type: ignore[attr-defined]
                name=f"{ENGINE_PREFIX}{spec.engine_id}",
                lifetime="detached",
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                runtime_env={"env_vars": dict(resources.environment)},
            ).remote(host, self._spec.store, resources.log_level)
        except ValueError as error:  # the name is still taken: the last incarnation is not quite gone
            raise EngineFailed(str(error)) from error


async def end_actor(actor: Any) -> None:
    """Let an actor end its work, then end its process. Does nothing for one that is dead."""
    try:
        await asyncio.wait_for(actor.stop.remote(), _STOP_TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        log.info("ended by force: %s", reason_of(error))
    ray.kill(actor)


def reason_of(error: BaseException) -> str:
    """The one line of an error that an operator wants to read."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, RayActorError):
        return f"engine process died: {_exit_detail(str(error))}"
    if isinstance(error, TimeoutError | GetTimeoutError):
        return "no answer in time"
    return str(error).strip() or type(error).__name__


def _exit_detail(text: str) -> str:
    """Ray's account of a dead worker without its page of advice."""
    match = re.search(r"Worker exit type: (\S+) Worker exit detail: ([^.]*)", text)
    if match is not None:
        return f"{match[2].strip()} ({match[1]})"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
