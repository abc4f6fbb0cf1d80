"""An engine whose model is a checksum over what it reads back through the block table.

The KV slot of a token stores the token itself; the next token is a checksum of all slots of the sequence, read in order
through its block table. A wrong, shared, stale or swapped block therefore changes tokens at once, which
real attention hides. Everything round it (blocks, schedulers, hand-offs) is the product's own code.

A pipelined one has a device that is as late as it may be: what it is told to do waits, in order, until the host waits
for it, and works on what is in the pool by then. A block given back too early shows as a wrong token.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import numpy as np

from kvbaton.engine.batch import SampledToken, ScheduledRow, StepResult
from kvbaton.engine.kv.kv_manager import KVManager

VOCAB = 1009


def next_token(tokens: Seq[int], seed: int, sample: int) -> int:
    """What `ToyEngine` draws after `tokens`: depends on every token, its place, the seed and the sample index."""
    data = np.asarray(tokens, dtype=np.int64).tobytes()
    return zlib.crc32(data, zlib.crc32(f"{seed}/{sample}".encode())) % VOCAB


def expected_tokens(prompt: Seq[int], count: int, seed: int = 0, sample: int = 0) -> list[int]:
    """The tokens that one sample must get whatever the batching, the blocks and the engines."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, sample))
    return tokens[len(prompt) :]


class ToyRow:
    """What the device is told of a row: places and tokens, as they are at the launch."""

    def __init__(self, row: ScheduledRow, block_size: int) -> None:
        self.owner = id(row.seq)
        self.seed = row.seq.sampling.seed
        self.samples = row.samples
        self.table = list(row.seq.block_table)
        self.end = row.start + row.num_tokens
        self.slots = [divmod(position, block_size) for position in range(row.start, self.end)]
        self.tokens = row.seq.tokens[row.start : self.end]  # one less where the last is being drawn


class ToyStep:
    """Satisfies `Pending`."""

    def __init__(self, engine: ToyEngine, rows: list[ToyRow]) -> None:
        self._engine = engine
        self.rows = rows
        self.result: StepResult | None = None

    def wait(self) -> StepResult:
        while self.result is None:
            self._engine.work()
        return self.result


class ToyEngine:
    """Satisfies `StepEngine` and, through `memory`, kvtransfer's `BlockMemory`."""

    pipelined = False
    left_to_host = 0  # every so-manyth token value is one that the device cannot draw, if any

    def __init__(
        self, num_blocks: int, block_size: int = 4, max_model_len: int = 4096, prefix_cache: bool = True
    ) -> None:
        self.kv = KVManager(num_blocks, block_size, prefix_cache)
        self.max_model_len = 4096
        self.vocab_size = VOCAB
        self.slots = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.rows_run: list[list[tuple[str, int]]] = []
        self._told: deque[Callable[[], None]] = deque()  # what the device has not done yet
        self._drawn: dict[int, int] = {}  # what its last step drew, by sequence

    @property
    def num_blocks(self) -> int:
        return self.slots.shape[0]

    @property
    def block_bytes(self) -> int:
        return self.slots.shape[1] * 8

    def block(self, block_id: int) -> np.ndarray:
        return self.slots[block_id].view(np.uint8)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self._tell(partial(self._copy, pairs))

    def launch(self, rows: list[ScheduledRow]) -> ToyStep:
        self.rows_run.append([(row.seq.request.request_id, row.num_tokens) for row in rows])
        step = ToyStep(self, [ToyRow(row, self.kv.block_size) for row in rows])
        self._tell(partial(self._compute, step))
        return step

    def work(self) -> None:
        """The device does the next thing that it was told."""
        self._told.popleft()()

    def _tell(self, what: Callable[[], None]) -> None:
        self._told.append(what)
        if not self.pipelined:
            self.work()

    def _copy(self, pairs: list[tuple[int, int]]) -> None:
        for src, dst in pairs:
            self.slots[dst] = self.slots[src]

    def _compute(self, step: ToyStep) -> None:
        for row in step.rows:
            tokens = row.tokens if len(row.tokens) == len(row.slots) else [*row.tokens, self._drawn[row.owner]]
            for (block, offset), token in zip(row.slots, tokens, strict=True):
                self.slots[row.table[block], offset] = token
        sampled = [tuple(self._draw(row, sample) for sample in row.samples) for row in step.rows]
        hard = [self.left_to_host and any(one.token_id % self.left_to_host == 0 for one in row) for row in sampled]
        self._drawn = {
            row.owner: 0 if left else drawn[-1].token_id
            for row, drawn, left in zip(step.rows, sampled, hard, strict=True)
            if drawn
        }
        step.result = StepResult(sampled, [None] * len(sampled), tuple(i for i, left in enumerate(hard) if left))

    def _draw(self, row: ToyRow, sample: int) -> SampledToken:
        read = self.slots[row.table].reshape(-1)[: row.end]
        return SampledToken(next_token(read, row.seed, sample))


class PipelinedToyEngine(ToyEngine):
    """One whose steps overlap, and that leaves some draws to the host."""

    pipelined = True
    left_to_host = 7
