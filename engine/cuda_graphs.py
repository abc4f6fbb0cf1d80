# mypy: allow-untyped-calls
"""Decode steps as CUDA graphs: a step of single tokens is one launch, whatever the number of layers.

    rows -> bucket (rows and block table width, both rounded up) -> one copy into static buffers -> replay -> hidden

Where a token id is not known yet, because the step before is still running, it is filled in between copy and replay.

A graph reads where it was captured to read, so each bucket's token ids, positions, slots, lengths and block tables lie
at fixed places in one device buffer, which each step overwrites: 7 words a row, then the tables.

    | token ids | positions | slots | context lengths | block tables        |
    | int64 * B | int64 * B | int64 | int32 * B       | int32 * B * width   |

Rows past the last real one belong to nobody: one token at position 0 of the scratch block, which no sequence holds.
They are computed like any other row and touch no live block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.engine.batch import BatchLayout, ScheduledRow
from kvbaton.engine.pending import TokenFeed
from kvbaton.kernels.meta import AttentionMeta

MAX_ROWS = 512
MAX_CONTEXT_TOKENS = 32768  # longer contexts run without a graph: there a launch costs little beside the step
LEAST_CONTEXT_TOKENS = 1024
_ROW_WORDS = 7

Replay = Callable[[], None]
Words = npt.NDArray[np.int32]


class Capture(Protocol):
    """Turns `run`, which reads and writes fixed memory, into a call that does the same again."""

    def __call__(self, run: Replay) -> Replay: ...


def run_again(run: Replay) -> Replay:
    """No graph: a replay runs `run`. What CPU tests capture with."""
    run()
    return run


class CudaCapture:
    """Real graphs; all share one memory pool, since no two replay at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        own = torch.cuda.Stream()
        own.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(own):
            run()  # kernels compile and libraries make their workspaces outside the capture
        torch.cuda.current_stream().wait_stream(own)
        graph = torch.cuda.CUDAGraph()
        # The transfer thread may allocate or copy meanwhile: only this thread's calls are captured, or forbidden.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        replay: Replay = graph.replay
        return replay


class DecodePass(Protocol):
    """The part of a decoder that is captured."""

    @property
    def device(self) -> torch.device: ...

    def forward(self, token_ids: torch.Tensor, kv_cache: torch.Tensor, meta: AttentionMeta) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """What a graph is captured for: rows, and blocks in a row's table."""

    rows: int
    width: int

    @property
    def words(self) -> int:
        return self.rows * (_ROW_WORDS + self.width)


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Ascending sizes that steps are rounded up to."""

    rows: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, max_running: int, max_model_len: int, block_size: int) -> GraphSizes:
        """Rows by powers of two and the steps half way between; widths by powers of two."""
        rows = min(max_running, MAX_ROWS)
        halves = sorted({n for i in range(10) for n in (1 << i, 3 << i) if n < rows and (n < 5 or n % 8 == 0)})
        blocks = -(-min(max_model_len, MAX_CONTEXT_TOKENS) // block_size)
        least = -(-LEAST_CONTEXT_TOKENS // block_size)
        widths = [least << i for i in range(16) if least << i < blocks]
        return cls((*halves, rows), (*widths, blocks))

    def bucket(self, rows: int, width: int) -> Bucket | None:
        """The smallest bucket that holds this much, or None."""
        row, column = bisect_left(self.rows, rows), bisect_left(self.widths, width)
        if row == len(self.rows) or column == len(self.widths):
            return None
        return Bucket(self.rows[row], self.widths[column])

    def buckets(self) -> list[Bucket]:
        """All of them, the largest first: the memory of a large graph serves the smaller ones captured after it."""
        return sorted((Bucket(rows, width) for rows in self.rows for width in self.widths), reverse=True)


class HostTables:
    """Block tables as rows of one array; a row is written again only when its table has changed."""

    def __init__(self, sizes: GraphSizes, scratch_block: int) -> None:
        self.array = np.full((sizes.rows[-1], sizes.widths[-1]), scratch_block, dtype=np.int32)
        self._scratch = scratch_block
        self._held: list[list[int]] = [[] for _ in range(sizes.rows[-1])]

    def put(self, row: int, table: list[int]) -> None:
        """`table` may be longer than the array is wide: blocks allocated ahead."""
        held = self._held[row]
        if held == table:
            return
        shown = table[: self.array.shape[1]]
        self.array[row, : len(shown)] = shown
        self.array[row, len(shown) : len(held)] = self._scratch
        self._held[row] = list(table)


class Staging:
    """Two pinned host buffers, used in turn: one is written while the copy from the other may not have run yet."""

    def __init__(self, words: int, device: torch.device) -> None:
        self._device = device
        cuda = device.type == "cuda"
        self._buffers = [torch.zeros(words, dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self._copied = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._at = 0

    def next(self, words: int) -> Words:
        """[words] int32, zero, to be written and sent. Waits for the copy before the last, which ended long ago."""
        self._at ^= 1
        copied = self._copied[self._at]
        if copied is not None:
            copied.synchronize()
        packed: Words = self._buffers[self._at][:words].numpy()
        packed.fill(0)
        return packed

    def send(self, words: int, target: torch.Tensor) -> None:
        """Start the copy of the first `words` of what `next` gave to target [at least words] int32."""
        target[:words].copy_(self._buffers[self._at][:words], non_blocking=True)
        copied = self._copied[self._at]
        if copied is not None:
            copied.record()


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Replay
    hidden: torch.Tensor  # [rows, hidden]


class DecodeGraphs:
    """The graphs of one decoder over one pool. Not thread-safe; a result is valid until the next call."""

    def __init__(
        self, decoder: DecodePass, pool: torch.Tensor, scratch_block: int, sizes: GraphSizes, capture: Capture
    ) -> None:
        """pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], block `scratch_block` among them."""
        self.sizes = sizes
        self._decoder = decoder
        self._pool = pool
        self._block_size = pool.shape[4]
        self._scratch = scratch_block
        self._capture = capture
        self._tables = HostTables(sizes, scratch_block)
        largest = Bucket(sizes.rows[-1], sizes.widths[-1])
        self._static = torch.zeros(largest.words, dtype=torch.int32, device=decoder.device)
        self._staging = Staging(largest.words, decoder.device)
        self._starts = torch.arange(largest.rows + 1, dtype=torch.int32, device=decoder.device)
        self._graphs: dict[Bucket, _Graph] = {}

    def bucket(self, rows: list[ScheduledRow], layout: BatchLayout) -> Bucket | None:
        """The bucket of `rows`; None for prompts and rows of several tokens, and for more or longer rows than any graph
        takes."""
        if layout.num_decodes != len(layout.owners) or len(layout.owners) != len(rows):
            return None
        longest = max(row.start for row in rows) + 1
        return self.sizes.bucket(len(rows), -(-longest // self._block_size))

    def forward(self, rows: list[ScheduledRow], bucket: Bucket, feed: TokenFeed) -> torch.Tensor:
        """Hidden states [len(rows), hidden] of the rows' tokens, whose K and V go to the pool."""
        self._load(rows, bucket, feed)
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = self._make(bucket)
        graph.replay()
        return graph.hidden[: len(rows)]

    @torch.inference_mode()
    def capture_all(self) -> int:
        """Make every graph now, so that no step waits for one; returns how many there are."""
        for bucket in self.sizes.buckets():
            if bucket not in self._graphs:
                self._pack([], [], bucket)
                self._staging.send(bucket.words, self._static)
                self._graphs[bucket] = self._make(bucket)
        return len(self._graphs)

    def _load(self, rows: list[ScheduledRow], bucket: Bucket, feed: TokenFeed) -> None:
        """Fill the static buffer with what a replay for `rows` reads."""
        self._pack(rows, [feed.tokens(row)[0] for row in rows], bucket)
        self._staging.send(bucket.words, self._static)
        feed.fill(rows, self._static[: 2 * bucket.rows].view(torch.int64))

    def _pack(self, rows: list[ScheduledRow], token_ids: list[int], bucket: Bucket) -> None:
        """Write the static buffer's content for `rows` to the staging buffer, scratch rows behind them."""
        packed = self._staging.next(bucket.words)
        count, size, ends = len(rows), bucket.rows, 6 * bucket.rows
        tokens, positions, slots = packed[:ends].view(np.int64).reshape(3, size)
        slots[count:] = self._scratch * self._block_size
        lens = packed[ends : ends + size]
        lens[count:] = 1
        tables = packed[ends + size :].reshape(size, bucket.width)
        tables[count:] = self._scratch
        if rows:
            tokens[:count] = token_ids
            positions[:count] = [row.start for row in rows]
            lens[:count] = positions[:count] + 1
            for i, row in enumerate(rows):
                self._tables.put(i, row.seq.block_table)
            tables[:count] = self._tables.array[:count, : bucket.width]
            at = positions[:count]
            slots[:count] = tables[np.arange(count), at // self._block_size].astype(np.int64) * self._block_size
            slots[:count] += at % self._block_size

    def _make(self, bucket: Bucket) -> _Graph:
        token_ids, meta = self._views(bucket)
        made: list[torch.Tensor] = []

        def run() -> None:
            hidden = self._decoder.forward(token_ids, self._pool, meta)
            if made and not hidden.is_cuda:
                made[0].copy_(hidden)  # as a graph does: its result lies where it was captured
            else:
                made[:] = [hidden]

        replay = self._capture(run)
        return _Graph(replay, made[0])

    def _views(self, bucket: Bucket) -> tuple[torch.Tensor, AttentionMeta]:
        """Token ids and meta over the static buffer. Host twins hold the largest values that the bucket allows."""
        size, ends = bucket.rows, 6 * bucket.rows
        token_ids, positions, slots = self._static[:ends].view(torch.int64).view(3, size)
        longest = bucket.width * self._block_size
        meta = AttentionMeta(
            positions=positions,
            slot_mapping=slots,
            block_tables=self._static[ends + size : bucket.words].view(size, bucket.width),
            cu_seqlens_q=self._starts[: size + 1],
            context_lens=self._static[ends : ends + size],
            num_decodes=size,
            query_lens=(1,) * size,
            context_lens_host=(longest,) * size,
            max_context_len=longest,
            block_size=self._block_size,
        )
        return token_ids, meta
