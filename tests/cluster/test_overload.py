"""More than fits: caps hold, nobody waits for ever, and whatever happens everything ends with its exact tokens."""

from __future__ import annotations

import random

import pytest

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.orders import LegKind
from kvbaton.engine.request import ErrorCause
from kvbaton.kvtransfer.messages import HandoffKey, Released
from support.toy_cluster import ToyCluster
from support.toy_engine import ToyEngine, expected_tokens
from support.worker_bench import WorkerBench, prompt_of, request

pytestmark = pytest.mark.usefixtures("_each_way")


def bench(num_blocks: int = 40, **limits: object) -> WorkerBench:
    return WorkerBench(ToyEngine(num_blocks), BatchConfig(max_tokens_per_step=64, **limits))  # type: ignore[arg-type]


def test_hand_offs_that_nobody_takes_fill_a_part_of_the_pool_only() -> None:
    """Guards a prefill pool full of finished prompts, in which nothing else can run."""
    b = bench(num_blocks=40)
    for i in range(10):
        b.submit(request(f"p{i}", prompt_of(20, i)), LegKind.PREFILL)
    b.run()
    assert b.worker.handing_off == 6, "six times five blocks are three quarters of forty"
    b.submit(request("local", prompt_of(8, 77), max_tokens=4))
    b.run()
    assert b.tokens("local") == expected_tokens(prompt_of(8, 77), 4), "what needs no hand-off goes on"
    b.worker.handle(Released(HandoffKey("p0", 0), acked=True), b.now)
    b.run()
    assert b.worker.handing_off == 6, "one out, one in"
    assert HandoffKey("p0", 0) not in b.worker.prefill.outgoing


def test_number_of_open_hand_offs_is_capped() -> None:
    b = bench(num_blocks=200, max_handoffs=3)
    for i in range(5):
        b.submit(request(f"p{i}", prompt_of(5, i)), LegKind.PREFILL)
    b.run()
    assert b.worker.handing_off == 3


def test_prompt_larger_than_the_cap_still_runs_alone() -> None:
    """Guards a request that could never start."""
    b = bench(num_blocks=40)
    b.submit(request("huge", prompt_of(150)), LegKind.PREFILL)
    b.run()
    assert b.worker.handing_off == 1


def test_queue_beyond_its_cap_refuses_by_name() -> None:
    b = bench(max_waiting=2, max_running=1)
    for i in range(4):
        b.submit(request(f"r{i}", prompt_of(5, i)))
    b.collect()
    (refusal,) = b.outputs
    assert (refusal.request_id, refusal.error) == ("r3", "engine queue is full (3 requests)")
    assert refusal.cause is ErrorCause.QUEUE_FULL


def test_engines_that_wait_for_each_other_get_on() -> None:
    """Two engines prefill for each other; their pools are full of finished prompts for the other one."""
    cluster = ToyCluster(num_blocks=16)
    for name in ("a", "b"):
        cluster.start(name)
    for i in range(12):
        legs = ("a", "b") if i % 2 else ("b", "a")
        cluster.submit(f"r{i}", tuple((i * 17 + k) % 997 for k in range(36)), 8, legs)
    cluster.settle()
    cluster.assert_clean()


@pytest.mark.parametrize("seed", range(25))
def test_no_load_can_block_itself(seed: int) -> None:
    """Tiny pools, prompts and outputs of all sizes, samples, both directions, preemption: all end, exactly."""
    rng = random.Random(seed)
    cluster = ToyCluster(num_blocks=rng.choice([8, 12, 20]))
    names = ("a", "b", "c")[: rng.choice([2, 2, 3])]
    for name in names:
        cluster.start(name)
    for i in range(rng.randrange(10, 30)):
        legs = tuple(rng.sample(names, 2)) if rng.random() < 0.8 else (rng.choice(names),)
        length = rng.randrange(1, cluster.num_blocks * 4 // 2)
        prompt = tuple((i % 5 * 13 + k * 7) % 997 for k in range(length))
        cluster.submit(f"r{i}", prompt, rng.randrange(1, cluster.num_blocks), legs, n=rng.choice([1, 1, 2]))
        for _ in range(rng.randrange(4)):
            name = rng.choice(names)
            cluster.nodes[name].poll()
            cluster.step(name)
    cluster.settle()
    for stream in cluster.streams.values():
        assert len(stream.done) == len(stream.tokens), stream.original.request_id
    cluster.assert_clean()
