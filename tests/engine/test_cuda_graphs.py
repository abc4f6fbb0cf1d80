"""Decode steps by bucket: sizes, static buffers, padding, and tokens, with a capture that runs the pass again.

Everything but the graph itself is the same as on CUDA. The reference kernels read nothing but the tensors of the step,
as a graph does; a value that the host froze into the capture shows as a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvbaton.engine.batch import BatchLayout, ScheduledRow
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.cuda_graphs import (
    Bucket,
    CudaCapture,
    DecodeGraphs,
    GraphSizes,
    HostTables,
    Replay,
    Staging,
    run_again,
)
from kvbaton.engine.engine import Engine
from kvbaton.engine.kv.kv_cache import KVCache
from kvbaton.engine.model.loader import load_model
from kvbaton.engine.pending import TokenFeed
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.runner import Runner
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.kernels import reference
from kvbaton.kernels.draw import TorchDraw
from support.engine_driver import EngineDriver, output
from support.oracle import TinyModels, prompts
from support.worker_bench import WorkerBench

CPU = torch.device("cpu")
TOKENS = 12
SIZES = GraphSizes((1, 2, 4, 8), (2, 8, 16))

OracleTokens = Callable[[Path, list[int], int], list[int]]


class CountingCapture:
    """Captures nothing; counts graphs and replays."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, run: Replay) -> Replay:
        self.captured += 1
        again = run_again(run)

        def replay() -> None:
            self.replayed += 1
            again()

        return replay


class GraphRig:
    """An engine on the CPU whose decode steps go through `DecodeGraphs`."""

    def __init__(self, folder: Path) -> None:
        engine = Engine.load(EngineConfig(folder, cache=CacheConfig(kv_memory_bytes=2 << 20)))
        decoder = load_model(folder, CPU).decoder.with_kernels(reference)
        engine.cache = KVCache(engine.geometry, engine.kv.num_blocks, CPU, scratch_blocks=1)
        self.capture = CountingCapture()
        self.scratch = engine.kv.num_blocks
        self.pool = engine.cache.pool
        self.graphs = DecodeGraphs(decoder, self.pool, self.scratch, SIZES, self.capture)
        engine._runner = Runner(decoder, self.pool, self.graphs, DeviceSampler(CPU))
        self.driver = EngineDriver(engine)


@pytest.fixture
def rig(tiny_model: TinyModels) -> Iterator[GraphRig]:
    made = GraphRig(tiny_model("llama"))
    yield made
    made.driver.finish()


def test_sizes_grow_by_halves_and_end_where_the_engine_does() -> None:
    """Too few sizes waste rows, too many cost start-up; one that the engine allows and no graph has runs slowly."""
    sizes = GraphSizes.of(256, 8192, 64)
    assert sizes == GraphSizes((1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256), (16, 32, 64, 128))
    assert GraphSizes.of(1, 10, 16) == GraphSizes((1,), (1,))
    assert GraphSizes.of(100_000, 1 << 20, 64).rows[-1] == 512
    assert GraphSizes.of(100_000, 1 << 20, 64).widths[-1] == 512


def test_the_smallest_bucket_that_fits_is_chosen() -> None:
    cases = [(1, 1, Bucket(1, 2)), (3, 2, Bucket(4, 2)), (4, 3, Bucket(4, 8)), (8, 16, Bucket(8, 16))]
    assert [SIZES.bucket(rows, width) for rows, width, _ in cases] == [bucket for *_, bucket in cases]
    assert SIZES.bucket(9, 1) is None
    assert SIZES.bucket(1, 17) is None
    assert SIZES.buckets()[0] == Bucket(8, 16)
    assert len(SIZES.buckets()) == 12


def test_a_table_row_follows_every_change() -> None:
    """A stale id reads or writes another sequence's block: growth, shrinking and a swap in the middle must all show."""
    tables = HostTables(GraphSizes((2,), (4,)), scratch_block=9)
    held = [5, 6, 7]
    tables.put(0, held)
    assert tables.array.tolist() == [[5, 6, 7, 9], [9, 9, 9, 9]]
    held[1] = 8  # in place, as copy-on-write does
    tables.put(0, held)
    assert tables.array[0].tolist() == [5, 8, 7, 9]
    tables.put(0, [3])
    assert tables.array[0].tolist() == [3, 9, 9, 9]
    tables.put(0, [1, 2, 3, 4, 5])  # a block ahead of the widest table
    assert tables.array[0].tolist() == [1, 2, 3, 4]
    tables.put(0, [1])
    assert tables.array.tolist() == [[1, 9, 9, 9], [9, 9, 9, 9]]


def test_the_static_buffer_holds_the_step_and_scratch_behind_it(rig: GraphRig) -> None:
    """Guards every field that a graph reads, for real rows and for padding, exactly."""
    one, two, three = (rig.driver.add(prompts()[i]) for i in (1, 2, 3))
    rig.driver.step((one, one.num_prompt), (two, two.num_prompt), (three, three.num_prompt))
    for seq in (one, two, three):
        seq.block_table.extend(rig.driver.engine.kv.allocate(1))
    rows = [ScheduledRow(seq, 1, (0,)) for seq in (three, one, two)]
    bucket = rig.graphs.bucket(rows, BatchLayout.of(rows))
    assert bucket == Bucket(4, 8)
    inner = rig.driver.add(prompts()[4])
    for other in (ScheduledRow(inner, 1, ()), ScheduledRow(inner, 2, ())):
        several = [*rows, other]
        assert rig.graphs.bucket(several, BatchLayout.of(several)) is None, "a prompt, of one token too"
    rig.graphs._load(rows, bucket, TokenFeed(TorchDraw()))
    token_ids, meta = rig.graphs._views(bucket)
    size, at = 16, [seq.num_computed for seq in (three, one, two)]
    assert token_ids.tolist() == [three.tokens[-1], one.tokens[-1], two.tokens[-1], 0]
    assert meta.positions.tolist() == [*at, 0]
    assert meta.context_lens.tolist() == [at[0] + 1, at[1] + 1, at[2] + 1, 1]
    slots = [seq.block_table[n // size] * size + n % size for seq, n in zip((three, one, two), at, strict=True)]
    assert meta.slot_mapping.tolist() == [*slots, rig.scratch * size]
    for row, seq in enumerate((three, one, two)):
        held = seq.block_table
        assert meta.block_tables[row].tolist() == held + [rig.scratch] * (8 - len(held))
    assert meta.block_tables[3].tolist() == [rig.scratch] * 8
    assert meta.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]


def test_tokens_equal_transformers_through_changing_batches(
    rig: GraphRig, tiny_model: TinyModels, oracle_tokens: OracleTokens
) -> None:
    """Guards replays against what an earlier step left: rows join, leave, change places and grow past a width."""
    folder = tiny_model("llama")
    seqs = [rig.driver.add(prompts()[i]) for i in (0, 1, 2, 4, 5)]
    for seq in seqs:
        rig.driver.prefill(seq, 1000)
    a, b, c, d, e = seqs
    for batch in ((a,), (a, b, c), (e, d, c, b, a), (c, a), (b, a, d), (d, e), (a,)):
        for _ in range(2):
            rig.driver.step(*((seq, 1) for seq in batch))
    assert rig.capture.replayed == 14
    assert rig.capture.captured < 10, "a bucket was captured twice"
    rig.driver.decode(TOKENS, *seqs)
    for seq in seqs:
        assert output(seq)[:TOKENS] == oracle_tokens(folder, list(seq.request.prompt), TOKENS)


def test_overlapping_steps_equal_transformers(
    rig: GraphRig, tiny_model: TinyModels, oracle_tokens: OracleTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replays read token ids that the draw before left on the device, while rows join and end."""
    engine, folder = rig.driver.engine, tiny_model("llama")
    engine.pipelined = True
    filled: list[int] = []

    def fill_tokens(kernels: TorchDraw, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
        filled.append(int((token_ids < 0).sum()))
        original(kernels, token_ids, drawn)

    original = TorchDraw.fill_tokens
    monkeypatch.setattr(TorchDraw, "fill_tokens", fill_tokens)
    bench = WorkerBench(engine, BatchConfig(max_tokens_per_step=128, prefill_chunk_tokens=32))
    for i, length in enumerate((TOKENS, 5, 9, TOKENS, 3)):
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        bench.submit(Request(f"r{i}", tuple(prompts()[i]), sampling))
        bench.step()
    bench.run()
    for i, length in enumerate((TOKENS, 5, 9, TOKENS, 3)):
        assert bench.tokens(f"r{i}") == oracle_tokens(folder, prompts()[i], length)
    assert rig.capture.replayed > 8
    assert sum(filled) > 20
    bench.assert_clean()


def test_staging_buffers_take_turns() -> None:
    """The copy of the last step may not have run when the next one is packed."""
    staging, target = Staging(4, CPU), torch.zeros(8, dtype=torch.int32)
    first = staging.next(4)
    first[:] = 7
    staging.send(4, target)
    second = staging.next(3)
    second[:] = 9
    assert first.tolist() == [7] * 4
    staging.send(3, target[4:])
    assert target.tolist() == [7, 7, 7, 7, 9, 9, 9, 0]
    assert staging.next(2).tolist() == [0, 0]
    assert second.tolist() == [9] * 3


def test_padding_touches_no_live_block(rig: GraphRig) -> None:
    """Padded rows write K and V like any other: all of it must land in the scratch block."""
    seqs = [rig.driver.add(prompts()[i]) for i in (0, 1, 2)]
    for seq in seqs:
        rig.driver.prefill(seq, 1000)
    before = rig.pool.clone()
    rig.driver.step(*((seq, 1) for seq in seqs))
    changed = (rig.pool != before).flatten(1).any(1).nonzero().flatten().tolist()
    size = rig.driver.engine.kv.block_size
    written = sorted(seq.block_table[(seq.num_computed - 1) // size] for seq in seqs)
    assert changed == [*written, rig.scratch]
    with pytest.raises(IndexError, match="does not exist"):
        rig.driver.engine.cache.block(rig.scratch)


def test_steps_that_no_graph_fits_run_without_one(
    rig: GraphRig, tiny_model: TinyModels, oracle_tokens: OracleTokens
) -> None:
    """Chunks, and more rows or longer contexts than any bucket, must still be computed."""
    many = [rig.driver.add(prompts()[0]) for _ in range(9)]
    rig.driver.step(*((seq, seq.num_prompt) for seq in many))
    rig.driver.step(*((seq, 1) for seq in many))
    mixed = rig.driver.add(prompts()[1])
    rig.driver.step((many[0], 1), (mixed, mixed.num_prompt))
    long = rig.driver.add((prompts()[6] * 2)[:256])
    rig.driver.prefill(long, 1000)
    rig.driver.step((long, 1))
    assert rig.capture.captured == 0
    want = oracle_tokens(tiny_model("llama"), prompts()[0], 3)
    assert output(many[0]) == want
    assert output(many[8]) == want[:2]


def test_all_graphs_can_be_made_before_the_first_step(
    rig: GraphRig, tiny_model: TinyModels, oracle_tokens: OracleTokens
) -> None:
    """Guards a warm start: no capture in a step, and none of them leaves a trace outside the scratch block."""
    before = rig.pool.clone()
    assert rig.graphs.capture_all() == rig.capture.captured == len(SIZES.buckets())
    assert (rig.pool != before).flatten(1).any(1).nonzero().flatten().tolist() == [rig.scratch]
    seq = rig.driver.add(prompts()[2])
    rig.driver.prefill(seq, 1000)
    rig.driver.decode(TOKENS, seq)
    assert rig.capture.captured == len(SIZES.buckets())
    assert output(seq) == oracle_tokens(tiny_model("llama"), prompts()[2], TOKENS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_steps_equal_eager_ones(tiny_model: TinyModels) -> None:
    """A real capture: the same kernels on the same inputs, batches that change between replays.

    Not to the bit: a padded batch may take another kernel of the matrix library.
    """
    folder, device = tiny_model("llama"), torch.device("cuda")
    engine = Engine.load(EngineConfig(folder, "cuda", cache=CacheConfig(kv_memory_bytes=4 << 20), cuda_graphs=False))
    decoder = load_model(folder, device).decoder
    graphs = DecodeGraphs(decoder, engine.cache.pool, engine.cache.num_blocks, SIZES, CudaCapture())
    assert graphs.capture_all() == len(SIZES.buckets())
    driver = EngineDriver(engine)
    seqs = [driver.add(prompts()[i]) for i in (1, 2, 4)]
    driver.step(*((seq, seq.num_prompt) for seq in seqs))
    for batch in ((0, 1, 2), (2, 0), (1,)):
        rows = [driver._row(seqs[i], 1) for i in batch]
        layout = BatchLayout.of(rows)
        bucket = graphs.bucket(rows, layout)
        assert bucket is not None
        captured = graphs.forward(rows, bucket, engine._runner._feed).clone()
        torch.testing.assert_close(captured, engine._runner._forward(rows, layout), atol=1e-3, rtol=1e-3)
        driver.step(*((seqs[i], 1) for i in batch))
    driver.finish()
