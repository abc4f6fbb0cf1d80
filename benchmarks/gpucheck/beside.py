"""Our kernels beside torch's own, at the shapes of a model: which of two ways an engine should go.

    prefill attention    ours over the paged pool; torch's flash attention over K and V gathered from it, and the gather
    matrix products      8-bit weights by ours; bfloat16 weights by torch's; each with its floor

A matrix is timed as several copies in turn, together larger than any cache: a decode step reads each weight once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpucheck.floors import Ceilings
from gpucheck.results import AttentionResult, LinearResult, Skipped
from gpucheck.timing import Clock

from kvbaton.engine.config import GPU_BLOCK_SIZE
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.kernels.meta import build_attention_meta
from kvbaton.kernels.torch_prefill import flash_attention
from kvbaton.kernels.triton_copy import gather_context
from kvbaton.kernels.triton_linear import linear_int8
from kvbaton.kernels.triton_prefill import prefill_into

QUERIES = 2048  # of the last chunk of a prompt
CACHES_BYTES = 256 << 20
ROWS = (1, 8, 32, 128, 512)
DTYPE = torch.bfloat16


def prefill_attention(
    config: ModelConfig, name: str, lengths: tuple[int, ...], clock: Clock
) -> Iterator[AttentionResult | Skipped]:
    """One layer, the last chunk of a prompt of each length, blocks shuffled; torch's is left out if it cannot run."""
    for tokens in lengths:
        yield from _attention(config, name, tokens, clock)


def _attention(config: ModelConfig, name: str, tokens: int, clock: Clock) -> Iterator[AttentionResult | Skipped]:
    device, heads, kv_heads, head_dim = clock.device, config.num_heads, config.num_kv_heads, config.head_dim
    queries, blocks, scale = min(tokens, QUERIES), -(-tokens // GPU_BLOCK_SIZE), config.head_dim**-0.5
    pool = torch.randn((blocks, 1, 2, kv_heads, GPU_BLOCK_SIZE, head_dim), device=device).to(DTYPE)
    q = torch.randn((queries, heads, head_dim), device=device).to(DTYPE)
    table = torch.randperm(blocks).tolist()
    meta = build_attention_meta([queries], [tokens], [table], GPU_BLOCK_SIZE, device, 0)
    tables, cu_q, lens = meta.block_tables, meta.cu_seqlens_q, meta.context_lens
    cu_k = torch.tensor([0, tokens], dtype=torch.int32, device=device)

    def ours() -> torch.Tensor:
        out = torch.empty_like(q)
        prefill_into(out, q, pool[:, 0], tables, cu_q, lens, scale, None)
        return out

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        return gather_context(pool[:, 0], tables, cu_k, tokens, tokens, DTYPE)

    k, v = gather()

    def theirs() -> torch.Tensor:
        return flash_attention(q, k, v, cu_q, cu_k, (queries, tokens), scale, None)

    ours_s, gather_s = clock.device_s(ours), clock.device_s(gather)
    try:
        apart = float((theirs().float() - ours().float()).abs().max())
        torch_s = clock.device_s(theirs)
    except (RuntimeError, NotImplementedError) as error:
        apart = torch_s = float("nan")
        yield Skipped(f"{name} flash attention of torch, {tokens} tokens", str(error).splitlines()[0][:200])
    flop = 4 * config.q_size * queries * (tokens - queries + (queries + 1) / 2)
    yield AttentionResult(name, queries, tokens, ours_s, torch_s, gather_s, flop, apart)


def products(
    config: ModelConfig,
    name: str,
    rows: tuple[int, ...],
    clock: Clock,
    found: Ceilings,
    caches_bytes: int = CACHES_BYTES,
) -> Iterator[LinearResult]:
    """The matrices of one layer and the one that gives logits, in copies of `caches_bytes` together."""
    shapes = {
        "qkv": (config.q_size + 2 * config.kv_size, config.hidden_size),
        "out": (config.hidden_size, config.q_size),
        "gate + up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
        "logits": (config.vocab_size, config.hidden_size),
    }
    for what, (outs, ins) in shapes.items():
        copies = max(1, min(64, caches_bytes // (outs * ins)))
        weights = [torch.randint(-127, 128, (outs, ins), dtype=torch.int8, device=clock.device) for _ in range(copies)]
        for count in rows:
            int8_s, bfloat16_s = _product_s(weights, count, clock)
            floor_s, flop_floor_s = outs * ins / found.copy_bytes_s, 2 * count * outs * ins / found.matmul_flop_s
            yield LinearResult(name, what, outs, ins, count, int8_s, bfloat16_s, floor_s, flop_floor_s)


def _product_s(weights: list[torch.Tensor], rows: int, clock: Clock) -> tuple[float, float]:
    """Seconds of one product with 8-bit weights, and of one with the same in bfloat16."""
    outs, ins = weights[0].shape
    x = torch.randn((rows, ins), device=clock.device).to(DTYPE)
    scale = torch.rand(outs, device=clock.device) / 1000
    wide = [weight.to(DTYPE) for weight in weights]

    def ours() -> None:
        for weight in weights:
            linear_int8(x, weight, scale)

    def theirs() -> None:
        for weight in wide:
            F.linear(x, weight)

    return _each_s(clock, ours, len(weights)), _each_s(clock, theirs, len(weights))


def _each_s(clock: Clock, run: Callable[[], None], copies: int) -> float:
    """As a graph, as in a decode step: no launches between two products."""
    return clock.captured_s(run) / copies
