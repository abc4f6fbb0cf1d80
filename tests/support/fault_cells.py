"""The fault matrix's rows and columns: how a request is brought into each state, and what each fault does.

One prefill and one decode engine with small pools. The victim's prompt fills half of the decode pool; other streams
keep it where it is wanted. Passes are slowed down while a state is reached and run at full speed after the fault.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.router.engine_info import EngineState, Role
from kvbaton.router.placement import RouterConfig
from support.engine_process import EngineOptions
from support.ingress_process import IngressProcess
from support.live_cluster import LiveCluster, Stream, until, until_told

PREFILL, DECODE = "prefill-0", "decode-0"
FREEZE_S = 5.0
_BLOCK_BYTES = 8 << 10  # of a tiny model in bfloat16
OPTIONS = {
    Role.PREFILL: EngineOptions(64 * _BLOCK_BYTES, 16, 16, prefix_cache=False, dtype="bfloat16"),
    Role.DECODE: EngineOptions(40 * _BLOCK_BYTES, 16, 16, prefix_cache=False, dtype="bfloat16"),
}
ALWAYS_SPLIT = RouterConfig(local_prefill_max_tokens=0)


def request(name: str, prompt_tokens: int, max_tokens: int) -> Request:
    """Sampled, with a penalty: a resumed stream that had lost its sampler's state would differ."""
    prompt = tuple(5 + (i * i + prompt_tokens) % 200 for i in range(prompt_tokens))
    sampling = SamplingParams(max_tokens, seed=7, temperature=0.8, frequency_penalty=0.3, ignore_eos=True)
    return Request(name, prompt, sampling)


VICTIM = request("victim", 320, 64)  # 20 blocks of decode's 40
FILLER = request("filler", 200, 8)  # less work than the victim, so prefill takes it first
HOLDER = request("holder", 400, 120)  # 25 blocks: the victim does not fit beside it
CROWDER = request("crowder", 240, 160)  # fits beside the victim until both have grown
PROBE = request("probe", 40, 8)  # asks whether the service is healthy
ALL_REQUESTS = (VICTIM, FILLER, HOLDER, CROWDER, PROBE)


class State(enum.StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"  # half computed, decode has no room yet
    OFFERED = "offered"  # computed, decode has no room yet
    GRANTED = "granted"  # landing blocks reserved, nothing sent
    TRANSFERRING = "transferring"
    ACKED = "acked"  # on decode, which has not run it yet
    RUNNING = "running"
    PREEMPTED = "preempted"
    MIGRATING = "migrating"  # between engines while it streams
    PARKED = "parked"  # in the router, no engine takes it


class Fault(enum.StrEnum):
    LEAVE = "client-leaves"
    KILL_PREFILL = "prefill-killed"
    KILL_DECODE = "decode-killed"
    KILL_INGRESS = "ingress-killed"
    FREEZE_PREFILL = "prefill-frozen"
    FREEZE_DECODE = "decode-frozen"
    RESTART_PREFILL = "prefill-restarted"
    RESTART_DECODE = "decode-restarted"
    CUT_SESSION = "session-cut"
    CUT_KV = "kv-cut"


FREEZES = {Fault.FREEZE_PREFILL: PREFILL, Fault.FREEZE_DECODE: DECODE}
KILLS = {Fault.KILL_PREFILL: PREFILL, Fault.KILL_DECODE: DECODE}
RESTARTS = {Fault.RESTART_PREFILL: PREFILL, Fault.RESTART_DECODE: DECODE}


@dataclass
class Scene:
    """One cell being played. Streams run in this process, or in `ingress` where that is what dies."""

    cluster: LiveCluster
    serial: int
    ingress: IngressProcess | None = None
    streams: list[Stream] = field(default_factory=list)
    victim: Stream | None = None
    migrations: list[asyncio.Task[str | None]] = field(default_factory=list)

    def submit(self, wanted: Request) -> str:
        named = replace(wanted, request_id=f"{wanted.request_id}-{self.serial}")
        if self.ingress is not None:
            self.ingress.submit(named)
            return named.request_id
        stream = self.cluster.stream(named)
        self.streams.append(stream)
        if wanted is VICTIM:
            self.victim = stream
        return named.request_id

    def num_tokens(self, request_id: str) -> int:
        if self.ingress is not None:
            return self.ingress.num_tokens(request_id)
        return next(len(s.times) for s in self.streams if s.request.request_id == request_id)

    def migrate(self, request_id: str, to: str) -> None:
        if self.ingress is not None:
            self.ingress.migrate(request_id, to)
        else:
            self.migrations.append(asyncio.create_task(self.cluster.client.migrate(request_id, 0, to)))

    async def pause(self, prefill_s: float, decode_s: float) -> None:
        for name, seconds in ((PREFILL, prefill_s), (DECODE, decode_s)):
            engine = self.cluster.engines[name]
            if engine.alive:
                await asyncio.to_thread(engine.slow_down, seconds)

    async def announce(self, state: EngineState) -> None:
        for name in (PREFILL, DECODE):
            if self.cluster.engines[name].alive:
                await asyncio.to_thread(self.cluster.engines[name].announce, state)

    async def requests(self, name: str) -> int:
        return (await self.cluster.stats(name)).requests


# ---- rows ---------------------------------------------------------------------------------------------------------


async def queued(scene: Scene) -> None:
    await scene.pause(0.3, 0.0)
    scene.submit(FILLER)
    await until_told(lambda: _sending(scene, 1), "the filler is being computed")
    scene.submit(VICTIM)

    async def waits() -> bool:
        stats = await scene.cluster.stats(PREFILL)
        return stats.load.waiting_requests == 2 and stats.transfer.sending == 1

    await until_told(waits, "the victim waits behind the filler")


async def prefilling(scene: Scene) -> None:
    await _hold_decode(scene)
    await scene.pause(0.05, 0.05)
    scene.submit(VICTIM)

    async def half_computed() -> bool:
        stats = await scene.cluster.stats(PREFILL)
        return 0 < stats.load.queued_prefill_tokens < 280 and stats.transfer.sending == 1

    await until_told(half_computed, "the victim is half computed")


async def offered(scene: Scene) -> None:
    await _hold_decode(scene)
    victim = scene.submit(VICTIM)
    await until(lambda: scene.num_tokens(victim) == 1, "the victim has its first token")

    async def waits() -> bool:
        stats = await scene.cluster.stats(DECODE)
        return stats.transfer.receiving == 1 and stats.load.waiting_requests == 1

    await until_told(waits, "the whole prompt waits for room on decode")


async def granted(scene: Scene) -> None:
    await scene.pause(0.5, 0.0)
    sent = (await scene.cluster.stats(PREFILL)).transfer.bytes_sent
    scene.submit(VICTIM)

    async def landing() -> bool:
        stats = await scene.cluster.stats(DECODE)
        return stats.transfer.receiving == 1 and stats.load.held_blocks == 20

    await until_told(landing, "decode has granted")
    assert (await scene.cluster.stats(PREFILL)).transfer.bytes_sent == sent


async def transferring(scene: Scene) -> None:
    await scene.pause(0.05, 0.0)
    sent = (await scene.cluster.stats(PREFILL)).transfer.bytes_sent
    scene.submit(VICTIM)

    async def moving() -> bool:
        return (await scene.cluster.stats(PREFILL)).transfer.bytes_sent > sent

    await until_told(moving, "blocks are moving")
    assert (await scene.cluster.stats(DECODE)).transfer.receiving == 1


async def acked(scene: Scene) -> None:
    await scene.pause(0.0, 0.5)
    before = (await scene.cluster.stats(PREFILL)).transfer.handoffs_acked
    victim = scene.submit(VICTIM)

    async def handed_over() -> bool:
        return (await scene.cluster.stats(PREFILL)).transfer.handoffs_acked > before

    await until_told(handed_over, "decode has everything")
    await until(lambda: scene.num_tokens(victim) >= 1, "the first token is here")
    assert scene.num_tokens(victim) == 1


async def running(scene: Scene) -> None:
    await scene.pause(0.0, 0.02)
    victim = scene.submit(VICTIM)
    await until(lambda: scene.num_tokens(victim) >= 8, "the victim runs")
    assert scene.num_tokens(victim) < 64


async def preempted(scene: Scene) -> None:
    await scene.pause(0.0, 0.2)
    before = (await scene.cluster.stats(DECODE)).counters.preemptions
    crowder = scene.submit(CROWDER)
    await until(lambda: scene.num_tokens(crowder) >= 2, "the crowder runs")
    victim = scene.submit(VICTIM)
    await until(lambda: scene.num_tokens(victim) >= 2, "the victim runs")
    await scene.pause(0.0, 0.01)

    async def gave_way() -> bool:
        stats = await scene.cluster.stats(DECODE)
        return stats.counters.preemptions > before and stats.load.waiting_requests == 1

    await until_told(gave_way, "the victim has given way")
    await scene.pause(0.0, 0.2)
    assert await scene.requests(DECODE) == 2


async def migrating(scene: Scene) -> None:
    """Decode hands the victim over to the prefill engine, and goes on with it meanwhile."""
    await scene.pause(0.0, 0.02)
    victim = scene.submit(VICTIM)
    await until(lambda: scene.num_tokens(victim) >= 8, "the victim runs")
    await scene.pause(0.7, 0.7)
    scene.migrate(victim, PREFILL)

    async def on_its_way() -> bool:
        return (await scene.cluster.stats(DECODE)).transfer.sending == 1

    await until_told(on_its_way, "the victim is on its way")


async def parked(scene: Scene) -> None:
    await running(scene)
    await scene.announce(EngineState.DRAINING)

    def all_draining() -> bool:
        return {info.state for info in scene.cluster.router.engines} == {EngineState.DRAINING}

    await until(all_draining, "no engine takes requests")
    await asyncio.to_thread(scene.cluster.engines[DECODE].cut, "session")

    async def dropped() -> bool:
        return await scene.requests(DECODE) == 0

    await until_told(dropped, "the victim is in the router alone")


async def _hold_decode(scene: Scene) -> None:
    """Another stream takes so much of decode's pool that the victim does not fit."""
    await scene.pause(0.0, 0.05)
    holder = scene.submit(HOLDER)
    await until(lambda: scene.num_tokens(holder) >= 2, "the holder runs")


async def _sending(scene: Scene, count: int) -> bool:
    return (await scene.cluster.stats(PREFILL)).transfer.sending == count


REACH: dict[State, Callable[[Scene], Awaitable[None]]] = {
    State.QUEUED: queued,
    State.PREFILLING: prefilling,
    State.OFFERED: offered,
    State.GRANTED: granted,
    State.TRANSFERRING: transferring,
    State.ACKED: acked,
    State.RUNNING: running,
    State.PREEMPTED: preempted,
    State.MIGRATING: migrating,
    State.PARKED: parked,
}


# ---- columns ------------------------------------------------------------------------------------------------------


async def strike(scene: Scene, fault: Fault) -> float:
    """Let it happen, and then let everything run at full speed; returns when it happened."""
    engines, struck_at = scene.cluster.engines, time.monotonic()
    if fault is Fault.LEAVE:
        for stream in scene.streams:
            stream.leave()
    elif fault is Fault.KILL_INGRESS:
        assert scene.ingress is not None
        await asyncio.to_thread(scene.ingress.kill)
    elif fault in FREEZES:
        engines[FREEZES[fault]].freeze()
    elif fault in KILLS or fault in RESTARTS:
        await asyncio.to_thread(engines[(KILLS | RESTARTS)[fault]].kill)
    else:
        for name in (PREFILL, DECODE):
            await asyncio.to_thread(engines[name].cut, "session" if fault is Fault.CUT_SESSION else "kv")
    if fault in RESTARTS:
        await scene.cluster.replace(RESTARTS[fault])
    if fault in FREEZES:
        await _go_on_frozen(scene, FREEZES[fault], struck_at)
    else:
        await scene.pause(0.0, 0.0)
        await scene.announce(EngineState.READY)
    return struck_at


async def _go_on_frozen(scene: Scene, frozen: str, struck_at: float) -> None:
    """The other engine goes on at once; the frozen one after FREEZE_S."""
    other = scene.cluster.engines[DECODE if frozen == PREFILL else PREFILL]
    await asyncio.to_thread(other.slow_down, 0.0)
    await asyncio.to_thread(other.announce, EngineState.READY)
    await asyncio.sleep(struck_at + FREEZE_S - time.monotonic())
    scene.cluster.engines[frozen].thaw()
    await asyncio.to_thread(scene.cluster.engines[frozen].slow_down, 0.0)
    await asyncio.to_thread(scene.cluster.engines[frozen].announce, EngineState.READY)
