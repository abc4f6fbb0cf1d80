"""What the launcher does with the manager actor: start it, follow its views, stop it. Its calls
block; they are for the main thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.host.engine_host import EngineStats
from kvbaton.cluster.pools.actors import (
    ENGINE_PREFIX,
    MANAGER_NAME,
    ManagerActor,
    ManagerSpec,
    reason_of,
)
from kvbaton.cluster.pools.manager import ManagerLost, PoolView
from kvbaton.cluster.pools.state import write_desired
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.store import StoreAddress

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 30.0
_STATS_TIMEOUT_S = 10.0
_RESTART_TIMEOUT_S = 60.0
_RESTART_PAUSE_S = 0.5


class ManagerClient:
    """Made by `start`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @classmethod
    def start(cls, spec: ManagerSpec, pools: PoolsConfig) -> ManagerClient:
        """Set the wanted pools and start the manager; returns as soon as it works on them."""
        _end_earlier()
        asyncio.run(_set_desired(spec.store, pools))
        actor = ManagerActor.options(name=MANAGER_NAME, lifetime="detached").remote(spec)  # type: ignore[attr-defined]
        client = cls(actor)
        ray.get(actor.start.remote())
        return client

    def views(self) -> Iterator[PoolView]:
        """The pools now, then after each change; goes on after a restart of the manager. Raises `ManagerLost`."""
        version = -1
        while True:
            try:
                view = ray.get(self._actor.changed.remote(version))
            except RayActorError:
                self._wait_for_restart()
                version = -1  # a new incarnation counts from the beginning
                continue
            version = view.version
            yield view

    def _wait_for_restart(self) -> None:
        """Ray starts the manager again by itself; until then its methods fail at once."""
        deadline = time.monotonic() + _RESTART_TIMEOUT_S
        while True:
            try:
                ray.get(self._actor.start.remote())
            except ActorDiedError as error:
                raise ManagerLost(f"the manager is dead: {reason_of(error)}") from error
            except RayActorError as error:
                if time.monotonic() > deadline:
                    raise ManagerLost(f"the manager does not come back: {reason_of(error)}") from error
                time.sleep(_RESTART_PAUSE_S)
            else:
                return

    def stats(self, view: PoolView) -> list[EngineStats]:
        """What each engine says of itself; an engine that does not answer is left out."""
        refs = []
        for engine in view.engines:
            actor = ray.get_actor(f"{ENGINE_PREFIX}{engine.engine_id}")
            refs.append(actor.stats.remote())
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=_STATS_TIMEOUT_S)
        return [ray.get(ref) for ref in done]

    def stop(self) -> None:
        """End every engine, then the manager."""
        try:
            ray.get(self._actor.stop.remote(), timeout=_STOP_TIMEOUT_S)
        finally:
            ray.kill(self._actor)


def _end_earlier() -> None:
    """A launcher that was killed leaves its manager, with its secret and engines, in a cluster that it had joined."""
    try:
        earlier = ManagerClient(ray.get_actor(MANAGER_NAME))
    except ValueError:
        return
    log.warning("ending the manager of an earlier launch")
    earlier.stop()


async def _set_desired(address: StoreAddress, pools: PoolsConfig) -> None:
    store = await RedisStore.open(address.url, address.namespace)
    try:
        await write_desired(store, pools)
    finally:
        await store.close()
