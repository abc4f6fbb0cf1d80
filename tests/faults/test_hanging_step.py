"""A forward pass that never returns in a process that is otherwise well: its heartbeat goes on, its leases are renewed.

Nobody outside can see that; the engine itself has to notice, say so, and let go of everything.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from kvbaton.router.engine_info import EngineInfo, EngineState, Role
from kvbaton.router.placement import RouterConfig
from support.engine_process import EngineOptions
from support.live_cluster import LiveCluster, until, until_told
from support.oracle import TinyModels

pytestmark = [pytest.mark.ucx, pytest.mark.redis]

STEP_LIMIT_S = 2.0
NEVER_S = 3600.0
REQUEST = Request(
    "r", tuple(5 + i * 7 % 200 for i in range(160)), SamplingParams(24, seed=3, temperature=0.7, ignore_eos=True)
)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_pass_that_never_returns_is_noticed_and_costs_no_token(tiny_model: TinyModels, role: Role) -> None:
    name, other = f"{role.value}-0", "decode-0" if role is Role.PREFILL else "prefill-0"
    options = EngineOptions(
        prefix_cache=False, prefill_chunk_tokens=16, max_tokens_per_step=16, step_limit_s=STEP_LIMIT_S
    )
    cluster = LiveCluster(
        tiny_model(Family.LLAMA),
        {Role.PREFILL: options, Role.DECODE: options},
        {Role.PREFILL: 1, Role.DECODE: 1},
        router=RouterConfig(local_prefill_max_tokens=0),
    )
    await cluster.start()
    try:
        expected = await cluster.stream(replace(REQUEST, request_id="undisturbed")).end()
        victim = cluster.engines[name]
        victim.slow_down(0.05)
        stream = cluster.stream(REQUEST)
        if role is Role.DECODE:
            await until(lambda: len(stream.times) >= 3, "it decodes")
        else:

            async def computing() -> bool:
                return (await cluster.stats(name)).load.held_blocks > 0

            await until_told(computing, "its prompt is being computed")
        victim.slow_down(NEVER_S)
        assert await stream.end() == expected
        await cluster.seconds_until_free(5.0, (other,))

        def entry() -> EngineInfo:
            return next(info for info in cluster.membership.engines if info.engine_id == name)

        await until(lambda: entry().state is EngineState.UNHEALTHY, "the list says so")  # it travels by the store
        assert entry().reason.startswith("a step has not returned for 2.")
        assert victim.alive, "nothing but its pass is wrong"
    finally:
        for engine in cluster.engines.values():
            engine.slow_down(0.0)
        await cluster.stop()
