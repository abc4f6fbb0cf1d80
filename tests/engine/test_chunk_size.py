"""The chunk size that an engine measures: which size is chosen of which rates, what the measuring costs and leaves."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from random import Random

import pytest

from kvbaton.engine import chunk_size
from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.chunk_size import BUDGET_S, RUNS, ChunkRate, choose, chunk_sizes, measure
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.runner import Runner
from kvbaton.engine.tiny import Family
from kvbaton.router.engine_info import Role
from support.engine_driver import EngineDriver
from support.local_cluster import EngineOptions, LocalCluster
from support.oracle import TinyModels, oracle_tokens, prompts


def rates(**of_size: float) -> list[ChunkRate]:
    return [ChunkRate(int(name[1:]), rate) for name, rate in of_size.items()]


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        (rates(c128=100), 128),  # one size only
        (rates(c128=50, c256=80, c512=94.9, c1024=99, c2048=100), 1024),  # just short of the share
        (rates(c128=50, c256=80, c512=95.0, c1024=99, c2048=100), 512),  # just enough
        (rates(c128=50, c256=100, c512=60, c1024=97), 256),  # a dip is no reason for a longer one
        (rates(c128=100, c256=90, c512=80), 128),  # falling
        (rates(c128=98, c256=100, c512=97, c1024=101), 128),  # noise on a plateau
        (rates(c1024=99, c128=10, c512=100), 512),  # in any order
    ],
)
def test_the_shortest_chunk_of_nearly_the_best_rate(measured: list[ChunkRate], chosen: int) -> None:
    """A longer chunk than that delays decode rows and hand-offs for nothing; a shorter one wastes the device."""
    assert choose(measured) == chosen


def test_no_rate_is_no_choice() -> None:
    with pytest.raises(ValueError, match="no chunk was measured"):
        choose([])


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (127, (127,)),
        (128, (128,)),
        (255, (128,)),
        (2048, (128, 256, 512, 1024, 2048)),
        (700, (128, 256, 512)),
    ],
)
def test_sizes_double_up_to_the_step_s_limit(most: int, sizes: tuple[int, ...]) -> None:
    assert chunk_sizes(most) == sizes


class Machine:
    """Runs chunks on a clock of its own: `fixed_s` a chunk, and `token_s` a token; `noise` may add as much again."""

    def __init__(self, fixed_s: float, token_s: float, noise: float = 0.0, compile_s: float = 0.0) -> None:
        self.now = 0.0
        self.ran: list[int] = []
        self._times = fixed_s, token_s, noise, compile_s
        self._random = Random(1)

    def run_s(self, size: int) -> float:
        fixed_s, token_s, noise, compile_s = self._times
        seconds = (fixed_s + size * token_s) * (1 + noise * self._random.random())
        self.now += seconds + (0.0 if self.ran else compile_s)
        self.ran.append(size)
        return seconds + (0.0 if len(self.ran) > 1 else compile_s)

    def rates(self, *sizes: int) -> list[ChunkRate]:
        return measure(self.run_s, sizes, lambda: self.now)


def test_each_size_counts_with_its_fastest_run() -> None:
    """The fixed cost of a step decides here: 128 tokens cost 2 units, 1024 cost 9, so 512 computes at 91 % of 4096."""
    machine = Machine(fixed_s=1e-3, token_s=1e-3 / 128)
    found = machine.rates(128, 256, 512, 1024, 2048, 4096)
    assert [rate.tokens for rate in found] == [128, 256, 512, 1024, 2048, 4096]
    assert found[0].tokens_s == pytest.approx(128 / 2e-3)
    assert machine.ran == [128] * (RUNS + 1) + [size for size in (256, 512, 1024, 2048, 4096) for _ in range(RUNS)]
    assert choose(found) == 2048
    noisy = Machine(fixed_s=1e-3, token_s=1e-3 / 128, noise=0.2).rates(128, 256, 512, 1024, 2048, 4096)
    assert choose(noisy) in (1024, 2048)


def test_compiling_is_no_part_of_a_rate_nor_of_the_budget() -> None:
    """A cold start compiles for longer than the budget; the sizes must be measured all the same."""
    machine = Machine(fixed_s=1e-3, token_s=1e-6, compile_s=10 * BUDGET_S)
    found = machine.rates(128, 256)
    assert [rate.tokens_s for rate in found] == pytest.approx([128 / 1.128e-3, 256 / 1.256e-3])


@pytest.mark.parametrize("token_s", [1e-4, 1e-3, 3e-3, 5e-3, 2e-2, 1.0])
def test_a_slow_machine_is_not_kept_from_serving(token_s: float) -> None:
    """Start-up is bounded: no run begins that is expected to end after the budget; one rate there is in any case."""
    machine = Machine(fixed_s=0.0, token_s=token_s)
    found = machine.rates(128, 256, 512, 1024, 2048)
    warm_up_s = 128 * token_s
    assert found[0].tokens == 128
    assert machine.now <= warm_up_s + max(BUDGET_S, warm_up_s)
    assert (len(found) < 5) == (token_s > 1e-3)


@pytest.fixture
def config(tiny_model: TinyModels) -> EngineConfig:
    batch = BatchConfig(max_tokens_per_step=300, prefill_chunk_tokens="auto")
    return EngineConfig(tiny_model(Family.QWEN3), cache=CacheConfig(kv_memory_bytes=8 << 20), batch=batch)


@pytest.mark.parametrize("pipelined", ["off", "on"])
def test_an_engine_measures_itself(config: EngineConfig, caplog: pytest.LogCaptureFixture, pipelined: str) -> None:
    """The real runner on the pool's own blocks: all come back, and tokens are what they are without."""
    with caplog.at_level(logging.INFO):
        engine = Engine.load(replace(config, pipelined=pipelined))
    assert engine.limits == replace(config.batch, prefill_chunk_tokens=engine.limits.prefill_chunk_tokens)
    assert engine.limits.chunk_tokens in (128, 256)
    assert re.search(r"prefill chunks of (128|256) tokens; measured: 128: \d+/s, 256: \d+/s", caplog.text)
    counts = engine.kv.counts()
    assert (counts.free, counts.held, counts.cached) == (counts.total, 0, 0)
    assert sorted(engine.kv._pool.free_blocks()) == list(range(counts.total))
    driver = EngineDriver(engine)
    for prompt in prompts()[:3]:
        seq = driver.add(prompt)
        driver.prefill(seq, engine.limits.chunk_tokens)
        driver.decode(8, seq)
        assert seq.tokens[seq.num_prompt :] == oracle_tokens(config.model, prompt)[:8]
    driver.finish()


def test_a_step_that_fails_leaves_no_block_behind(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(replace(config, batch=replace(config.batch, prefill_chunk_tokens=7)))

    def out_of_memory(rows: list[ScheduledRow]) -> None:
        raise MemoryError("no room for activations")

    monkeypatch.setattr(engine._runner, "run", out_of_memory)
    with pytest.raises(MemoryError):
        engine._measured_limits()
    assert engine.kv.counts().free == engine.kv.num_blocks


def test_every_chunk_sees_as_much_context(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks timed at the start of a prompt would favour short ones, at its end long ones."""
    middles, inner = set(), Runner.run

    def noted(runner: Runner, rows: list[ScheduledRow]) -> object:
        middles.add(2 * rows[0].start + rows[0].num_tokens)
        return inner(runner, rows)

    monkeypatch.setattr(Runner, "run", noted)
    Engine.load(config)
    assert middles == {300}


def test_the_pool_and_the_model_bound_what_is_tried(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 5 blocks has no room for a step's 300 tokens, and a model of 60 positions no rotation for them."""
    tried: list[int] = []
    monkeypatch.setattr(chunk_size, "measure", lambda run_s, sizes: tried.extend(sizes) or [ChunkRate(sizes[0], 1.0)])
    five = 5 * Engine.load(config).geometry.block_bytes
    Engine.load(replace(config, cache=CacheConfig(kv_memory_bytes=five)))
    Engine.load(replace(config, max_model_len=60))
    assert tried == [128, 256, 80, 60]


def test_what_is_set_is_not_measured(config: EngineConfig) -> None:
    batch = replace(config.batch, prefill_chunk_tokens=7)
    assert Engine.load(replace(config, batch=batch)).limits is batch


@pytest.mark.ucx
async def test_a_served_engine_runs_chunks_of_the_measured_size(tiny_model: TinyModels) -> None:
    """The registry, and with it the router and `/metrics`, have the size that the steps have."""
    options = EngineOptions(max_tokens_per_step=96, prefill_chunk_tokens="auto")
    async with LocalCluster(tiny_model(Family.LLAMA), (Role.HYBRID,), options) as cluster:
        assert [info.prefill_chunk_tokens for info in cluster.membership.engines] == [96]
        await cluster.assert_clean()
        prompt = tuple(range(5, 95))
        await cluster.tokens(Request("r", prompt, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
        assert cluster.engines["hybrid-0"].stats().counters.steps < 6  # in chunks of 16 it would be six
        await cluster.assert_clean()
