"""An engine whose model is a checksum over what it reads back through the block table.

The KV slot of a token stores the token itself; the next token is a checksum of all slots of the sequence, read in order
through its block table. A wrong, shared, stale or swapped block therefore changes tokens at once, which
real attention hides. Everything round it (blocks, schedulers, hand-offs) is the product's own code.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Seq

import numpy as np

from kvbaton.engine.batch import SampledToken, ScheduledRow, StepResult
from kvbaton.engine.kv_manager import KVManager
from kvbaton.engine.sequence import Sequence

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


class ToyEngine:
    """Satisfies `StepEngine` and, through `memory`, kvtransfer's `BlockMemory`."""

    def __init__(
        self, num_blocks: int, block_size: int = 4, max_model_len: int = 4096, prefix_cache: bool = True
    ) -> None:
        self.kv = KVManager(num_blocks, block_size, prefix_cache)
        self.max_model_len = 4096
        self.vocab_size = VOCAB
        self.slots = np.full((num_blocks, block_size), -1, dtype=np.int64)
        self.rows_run: list[list[tuple[str, int]]] = []

    @property
    def num_blocks(self) -> int:
        return self.slots.shape[0]

    @property
    def block_bytes(self) -> int:
        return self.slots.shape[1] * 8

    def block(self, block_id: int) -> np.ndarray:
        return self.slots[block_id].view(np.uint8)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        for src, dst in pairs:
            self.slots[dst] = self.slots[src]

    def run(self, rows: list[ScheduledRow]) -> StepResult:
        self.rows_run.append([(row.seq.request.request_id, row.num_tokens) for row in rows])
        for row in rows:
            self._write(row.seq, row.num_tokens)
        sampled = [tuple(self._draw(row, sample) for sample in row.samples) for row in rows]
        return StepResult(sampled, [None] * len(rows))

    def _write(self, seq: Sequence, num_tokens: int) -> None:
        for position in range(seq.num_computed, seq.num_computed + num_tokens):
            block, offset = divmod(position, self.kv.block_size)
            self.slots[seq.block_table[block], offset] = seq.tokens[position]

    def _draw(self, row: ScheduledRow, sample: int) -> SampledToken:
        end = row.seq.num_computed + row.num_tokens
        read = self.slots[row.seq.block_table].reshape(-1)[:end]
        return SampledToken(next_token(read, row.seq.sampling.seed, sample))
