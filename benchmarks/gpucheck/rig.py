"""A model of random weights with a full KV pool, and steps of it that can be repeated: nothing advances.

The pool holds noise, which is what attention reads in production; zeros would cost less power and less time.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from kvbaton.engine.batch import BatchLayout, ScheduledRow
from kvbaton.engine.config import CPU_BLOCK_SIZE, GPU_BLOCK_SIZE
from kvbaton.engine.cuda_graphs import CudaCapture, DecodeGraphs, GraphSizes, Replay, run_again
from kvbaton.engine.kv.kv_cache import KVCache, KVGeometry
from kvbaton.engine.model.loader import random_model
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.runner import Runner
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels import reference
from kvbaton.kernels.backend import kernels_for
from kvbaton.kernels.meta import AttentionMeta

BATCHES = (1, 8, 32, 128, 256)
MAX_POSITIONS = 33024
POOL_SHARE = 0.85  # of the memory that is free after the weights


@dataclass(frozen=True, slots=True)
class CapturedStep:
    replay: Replay
    meta: AttentionMeta


class Rig:
    """`runner` is the engine's own; `decoder` and `kernels` are what its graphs hold."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        kv_dtype: torch.dtype | None,
        tokens: int,
        quantization: str = "none",
    ) -> None:
        """A pool for `tokens` tokens, or for as many as fit."""
        self.config, self.device = config, device
        cuda = device.type == "cuda"
        model = random_model(config, 1, device, max_positions=MAX_POSITIONS, quantization=quantization)
        self.decoder, self.weight_itemsize = model.decoder, 1 if quantization == "int8" else 2
        self.kernels = kernels_for(device) if cuda else reference
        self.decoder = self.decoder.with_kernels(self.kernels)
        self.block_size = GPU_BLOCK_SIZE if cuda else CPU_BLOCK_SIZE
        dtype = kv_dtype or self.decoder.dtype
        geometry = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, self.block_size, dtype)
        self.kv_itemsize = dtype.itemsize
        self.num_blocks = self._blocks(geometry, tokens)
        self.cache = KVCache(geometry, self.num_blocks, device, scratch_blocks=1)
        self._fill()
        sizes = GraphSizes(BATCHES, GraphSizes.of(1, MAX_POSITIONS, self.block_size).widths)
        capture = CudaCapture() if cuda else run_again
        self.graphs = DecodeGraphs(self.decoder, self.cache.pool, self.num_blocks, sizes, capture)
        self.runner = Runner(self.decoder, self.cache.pool, self.graphs, DeviceSampler(device))
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(0))
        self._order: list[int] = order.tolist()

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def sequences(self, batch: int, context: int, drawn: int = 1) -> list[Sequence] | None:
        """Sequences of `context` tokens in the pool and one to compute, the last `drawn` of them generated; None where
        the pool is too small."""
        each = -(-(context + 1) // self.block_size)
        if batch * each > self.num_blocks:
            return None
        made = []
        for i in range(batch):
            tokens = tuple(7 + (i * 31 + n) % 200 for n in range(context + 1))
            request = Request(f"r{i}", tokens[: context + 1 - drawn], _greedy(), emitted=tokens[context + 1 - drawn :])
            seq = Sequence(request, 0.0)
            seq.num_computed = context
            seq.block_table = self._order[i * each : (i + 1) * each]
            made.append(seq)
        return made

    def decode_rows(self, batch: int, context: int) -> list[ScheduledRow] | None:
        seqs = self.sequences(batch, context)
        return None if seqs is None else [ScheduledRow(seq, 1, (0,)) for seq in seqs]

    def captured(self, rows: list[ScheduledRow]) -> CapturedStep:
        """The graph of a step that has run, and what it reads."""
        bucket = self.graphs.bucket(rows, BatchLayout.of(rows))
        if bucket is None:
            raise ValueError(f"no graph holds {len(rows)} rows")
        return CapturedStep(self.graphs._graphs[bucket].replay, self.graphs._views(bucket)[1])

    def prompt(self, tokens: int) -> Sequence:
        """A sequence of which nothing is computed, with blocks for all of it."""
        made = self.sequences(1, tokens - 1, drawn=0)
        if made is None:
            raise ValueError(f"{tokens} tokens do not fit into {self.capacity_tokens}")
        return made[0]

    def prefill(self, seq: Sequence, chunk: int) -> None:
        """Compute a prompt in chunks, each launched while the one before runs; all are awaited, and nothing is kept."""
        tokens, launched = len(seq.tokens), []
        for start in range(0, tokens, chunk):
            seq.num_computed = start
            count = min(chunk, tokens - start)
            launched.append(self.runner.launch([ScheduledRow(seq, count, (0,) if start + count == tokens else ())]))
        for step in launched:
            step.wait()

    def close(self) -> None:
        """Give the memory back before the next model."""
        del self.runner, self.graphs, self.cache, self.decoder
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _blocks(self, geometry: KVGeometry, tokens: int) -> int:
        wanted = -(-tokens // self.block_size)
        if self.device.type != "cuda":
            return wanted
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(wanted, int(free * POOL_SHARE) // geometry.block_bytes)

    def _fill(self) -> None:
        for block in self.cache.pool:
            block.copy_(torch.randn(block.shape, device=self.device).to(block.dtype))


def _greedy() -> SamplingParams:
    return SamplingParams(max_tokens=1, temperature=0.0)
