"""Guards the promise behind checksums: a block that lands wrong costs a computation, never a wrong token."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from kvbaton.cluster.ingress.engine_metrics import EngineMetrics
from kvbaton.router.engine_info import Role
from support.faulty_transport import Fault
from support.toy_cluster import Stream, ToyCluster
from support.toy_service import ToyService

PROMPT = tuple(range(100, 130))
TOKENS = 12


def serve(checksum: str, fault: Fault) -> tuple[ToyCluster, Stream]:
    """One request from p to d, whose first landing block meets `fault`; run to its end."""
    cluster = ToyCluster(checksum=checksum)
    for name in ("p", "d"):
        cluster.start(name)
    cluster.nodes["d"].weather.strike("landing", fault)
    stream = cluster.submit("r", PROMPT, TOKENS, ("p", "d"))
    for _ in range(200):
        for name in ("p", "d"):
            cluster.nodes[name].poll()
            cluster.step(name)
        cluster.audit()
        if stream.over:
            break
    return cluster, stream


@pytest.mark.parametrize("checksum", ["xxh3", "crc32c"])
def test_a_corrupted_block_is_recomputed_and_the_tokens_are_exact(checksum: str) -> None:
    cluster, stream = serve(checksum, Fault.CORRUPT)
    assert stream.over
    assert stream.request.epoch > 0  # it was resumed
    assert cluster.nodes["d"].agent.stats().checksum_failures == 1
    cluster.settle()
    cluster.assert_clean()


async def test_it_is_counted_in_metrics_of_the_engine_where_it_landed() -> None:
    service = ToyService(checksum="xxh3")
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
        service.start(name, role)
    await service.submit("sound", PROMPT, TOKENS)
    await service.settle()
    service.nodes["d"].weather.strike("landing", Fault.CORRUPT)
    hit = await service.submit("hit", tuple(reversed(PROMPT)), TOKENS)
    await service.until(lambda: hit.over)
    left = await service.submit("left", PROMPT[3:], TOKENS)
    await service.until(lambda: service.nodes["d"].agent.stats().receiving)
    left.cancel()
    await service.settle()
    service.assert_clean()
    registry = CollectorRegistry()
    registry.register(EngineMetrics(lambda: service.router.engines, service.client))

    def counted(what: str, engine: str, role: Role) -> float | None:
        return registry.get_sample_value(f"kvbaton_engine_{what}_total", {"engine": engine, "role": role.value})

    whats = ("handoffs_completed", "handoffs_failed", "kv_checksum_failures")
    assert [counted(what, "p", Role.PREFILL) for what in whats] == [1, 1, 0]
    assert [counted(what, "d", Role.DECODE) for what in whats] == [0, 1, 1]


def test_a_sound_transfer_is_taken_over_with_checksums_on() -> None:
    cluster, stream = serve("xxh3", Fault.PASS)
    assert stream.over
    assert stream.request.epoch == 0
    assert cluster.nodes["d"].agent.stats().checksum_failures == 0
    assert cluster.nodes["d"].agent.stats().handoffs_failed == 0
    cluster.settle()
    cluster.assert_clean()


def test_without_checksums_the_same_fault_gives_wrong_tokens() -> None:
    """The fault is real: what the two tests above prove is the checksum's work."""
    _, stream = serve("off", Fault.CORRUPT)
    assert stream.over
    with pytest.raises(AssertionError):
        stream.assert_exact()
