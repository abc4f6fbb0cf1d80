"""Guards the promise behind checksums: a block that lands wrong costs a computation, never a wrong token."""

from __future__ import annotations

import pytest

from kvbaton.kvtransfer.faults import Fault
from support.toy_cluster import Stream, ToyCluster

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
