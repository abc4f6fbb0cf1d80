"""Every state of a request x every fault, on real processes and real UCX: same tokens, nothing held, service healthy.

Frozen processes take five seconds each, so all but a few of them run under the `chaos` marker.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from kvbaton.engine.tiny import Family
from kvbaton.router.engine_info import Role
from support.fault_cells import (
    ALL_REQUESTS,
    ALWAYS_SPLIT,
    DECODE,
    FREEZES,
    KILLS,
    OPTIONS,
    PREFILL,
    PROBE,
    REACH,
    VICTIM,
    Fault,
    Scene,
    State,
    strike,
)
from support.fault_table import Finding
from support.ingress_process import IngressProcess
from support.live_cluster import LiveCluster
from support.oracle import TinyModels

pytestmark = [pytest.mark.ucx, pytest.mark.redis, pytest.mark.asyncio(loop_scope="module")]

LEASE_S = 10.0
QUICK_FREEZES = {(State.OFFERED, Fault.FREEZE_DECODE), (State.TRANSFERRING, Fault.FREEZE_PREFILL)}

SERIALS = itertools.count()


class Stage:
    """One cluster for all cells, started anew after a cell that failed."""

    def __init__(self, model: Path, findings: list[Finding]) -> None:
        self.model = model
        self.cluster: LiveCluster | None = None
        self.expected: dict[str, dict[int, list[int]]] = {}
        self.findings = findings
        self.played = True

    async def ready(self) -> LiveCluster:
        if self.cluster is not None and not self.played:
            await self.close()
        self.played = False
        if self.cluster is None:
            self.cluster = LiveCluster(self.model, OPTIONS, {Role.PREFILL: 1, Role.DECODE: 1}, router=ALWAYS_SPLIT)
            await self.cluster.start()
            for wanted in ALL_REQUESTS:
                self.expected[wanted.request_id] = await self.cluster.stream(wanted).end()
        return self.cluster

    async def close(self) -> None:
        if self.cluster is not None:
            for engine in self.cluster.engines.values():
                if engine.alive:
                    engine.thaw()
            await self.cluster.stop()
            self.cluster = None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tiny_model: TinyModels, findings: list[Finding]) -> AsyncIterator[Stage]:
    stage = Stage(tiny_model(Family.LLAMA), findings)
    yield stage
    await stage.close()


def cells() -> list[object]:
    found = []
    for fault, state in itertools.product(Fault, State):
        slow = fault in FREEZES and (state, fault) not in QUICK_FREEZES
        found.append(pytest.param(state, fault, id=f"{state}-{fault}", marks=[pytest.mark.chaos] if slow else []))
    return found


@pytest.mark.parametrize(("state", "fault"), cells())
async def test_cell(stage: Stage, state: State, fault: Fault) -> None:
    """See the module's text; a fault may cost latency, never a token and never a block."""
    cluster = await stage.ready()
    scene = Scene(cluster, next(SERIALS))
    if fault is Fault.KILL_INGRESS:
        scene.ingress = IngressProcess(cluster.url, len(cluster.engines), ALWAYS_SPLIT)
        await asyncio.to_thread(scene.ingress.ready)
    await REACH[state](scene)
    struck_at = await strike(scene, fault)
    if fault in (Fault.LEAVE, Fault.KILL_INGRESS):
        await cluster.seconds_until_free(1.0 if fault is Fault.KILL_INGRESS else 2.0)
        outcome, recovered_s, free_s = "released", time.monotonic() - struck_at, 0.0
    else:
        survivors = tuple({PREFILL, DECODE} - {KILLS.get(fault)})
        recovered_s = await streams_end_right(stage, scene, struck_at)
        free_s = await cluster.seconds_until_free(LEASE_S + 2.0 if fault in FREEZES else 2.0, survivors)
        outcome = "same tokens"
    if fault in KILLS:
        await cluster.replace(KILLS[fault])
    await healthy(stage, cluster)
    stage.findings.append(Finding(state, fault, outcome, recovered_s, free_s))
    stage.played = True


async def streams_end_right(stage: Stage, scene: Scene, struck_at: float) -> float:
    """Seconds from the fault to the victim's next token."""
    for stream in scene.streams:
        kind = stream.request.request_id.rsplit("-", 1)[0]
        assert await stream.end() == stage.expected[kind], stream.request.request_id
    assert scene.victim is not None
    later = [at - struck_at for at in scene.victim.times if at > struck_at]
    return later[0] if later else 0.0


async def healthy(stage: Stage, cluster: LiveCluster) -> None:
    await cluster.until_connected()
    probe = replace(PROBE, request_id=f"probe-{next(SERIALS)}")
    placed = cluster.client.counters.placed_pairs
    assert await cluster.stream(probe).end() == stage.expected["probe"]
    assert cluster.client.counters.placed_pairs == placed + 1, "the pair works as a pair again"
    await cluster.seconds_until_free(2.0)


async def test_the_matrix_is_whole() -> None:
    """Guards a state or fault that nobody plays."""
    assert set(REACH) == set(State)
    assert len(cells()) == len(State) * len(Fault)
    assert VICTIM in ALL_REQUESTS
