"""Times of the device's own ceilings, of decode and prefill steps of the engine's runner, and of block copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from gpucheck import floors
from gpucheck.floors import Ceilings
from gpucheck.results import BlockResult, DecodeResult, DrawResult, PrefillResult, Skipped
from gpucheck.rig import Rig
from gpucheck.timing import Clock

from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.engine.sampling.sampler import Draw
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.meta import AttentionMeta

MAX_CHUNK = 8192
CHUNKS = (256, 512, 1024, 2048, 4096, 8192)


def ceilings(clock: Clock, tiny: bool) -> Ceilings:
    """Best copy rate over two sizes (bytes read and written), and a large square bfloat16 product."""
    device = clock.device
    rates = []
    for size in (1 << 20,) if tiny else (1 << 30, 4 << 30):
        source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
        target = torch.empty_like(source)
        rates.append(2 * size / clock.device_s(lambda s=source, t=target: t.copy_(s)))
        del source, target
    n = 256 if tiny else 8192
    a, b = (torch.randn((n, n), device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return Ceilings(max(rates), 2 * n**3 / clock.device_s(lambda: torch.mm(a, b, out=out)))


def decode(
    rig: Rig, name: str, batches: tuple[int, ...], contexts: tuple[int, ...], clock: Clock, found: Ceilings
) -> Iterator[DecodeResult | Skipped]:
    """Whole steps as the host sees them, and the parts of the same step as graphs of their own."""
    for context in contexts:
        for batch in batches:
            rows = rig.decode_rows(batch, context)
            if rows is None:
                need = floors.kv_bytes(rig.config, batch, context, rig.kv_itemsize) / 1e9
                yield Skipped(f"{name} decode {batch} x {context}", f"{need:.0f} GB of KV do not fit")
                continue
            began = time.perf_counter()
            rig.runner.run(rows)  # captures the graph
            first_s = time.perf_counter() - began
            step_s = clock.wall_s(lambda rows=rows: rig.runner.run(rows))
            captured = rig.captured(rows)
            graph_s = clock.device_s(captured.replay)
            weights_s, attention_s, rest_s = (clock.captured_s(part) for part in _parts(rig, captured.meta))
            yield DecodeResult(
                model=name,
                batch=batch,
                context=context,
                step_s=step_s,
                floor_s=floors.decode_floor_s(rig.config, batch, context, rig.kv_itemsize, found, rig.weight_itemsize),
                goal=floors.decode_goal(batch),
                graph_s=graph_s,
                weights_s=weights_s,
                attention_s=attention_s,
                rest_s=rest_s,
                first_s=first_s,
            )


def _parts(rig: Rig, meta: AttentionMeta) -> tuple[Callable[[], None], Callable[[], None], Callable[[], None]]:
    """All matrix products of a step with the logits; all attention; norms, rotation and activation."""
    config, weights, kernels = rig.config, rig.decoder.weights, rig.kernels
    tokens, dtype = meta.num_tokens, rig.decoder.dtype
    wide = max(config.q_size, config.hidden_size, config.intermediate_size)
    noise = torch.randn((tokens, wide), device=rig.device).to(dtype)
    q, k = (
        torch.randn((tokens, n, config.head_dim), device=rig.device).to(dtype)
        for n in (config.num_heads, config.num_kv_heads)
    )
    gate_up = torch.randn((tokens, 2 * config.intermediate_size), device=rig.device).to(dtype)
    hidden, inner, heads = (
        noise[:, :n].contiguous() for n in (config.hidden_size, config.intermediate_size, config.q_size)
    )

    def products() -> None:
        linear = rig.decoder._linear
        for layer in weights.layers:
            linear(hidden, layer.attention.qkv, None)
            linear(heads, layer.attention.out, None)
            linear(hidden, layer.mlp.gate_up, None)
            linear(inner, layer.mlp.down, None)
        linear(hidden, weights.lm_head, None)

    def attention() -> None:
        for i, window in enumerate(config.sliding_windows):
            kernels.paged_attention(q, rig.cache.pool, i, meta, config.head_dim**-0.5, window)

    def rest() -> None:
        for i, layer in enumerate(weights.layers):
            kernels.add_rms_norm(hidden, hidden, layer.input_norm, config.rms_norm_eps)
            if layer.attention.q_norm is not None:
                kernels.rms_norm(q, layer.attention.q_norm, config.rms_norm_eps)
                kernels.rms_norm(k, layer.attention.k_norm, config.rms_norm_eps)
            kernels.rope_and_write_kv(q, k, k, rig.decoder.rotary.cos, rig.decoder.rotary.sin, rig.cache.pool, i, meta)
            kernels.add_rms_norm(hidden, hidden, layer.post_norm, config.rms_norm_eps)
            kernels.silu_mul(gate_up)

    return products, attention, rest


def prefill(
    rig: Rig, name: str, lengths: tuple[int, ...], clock: Clock, found: Ceilings
) -> Iterator[PrefillResult | Skipped]:
    """One prompt a time, in chunks of at most MAX_CHUNK."""
    for tokens in lengths:
        if tokens > rig.capacity_tokens:
            yield Skipped(f"{name} prefill {tokens}", "its KV does not fit")
            continue
        chunk = min(tokens, MAX_CHUNK)
        yield _prefilled(rig, name, tokens, chunk, clock, found)


def chunk_sizes(rig: Rig, name: str, clock: Clock, found: Ceilings) -> Iterator[PrefillResult]:
    """The same prompt of 8k in chunks of every size: where the rate stops growing is the chunk to use."""
    for chunk in CHUNKS:
        if chunk <= MAX_CHUNK <= rig.capacity_tokens:
            yield _prefilled(rig, name, MAX_CHUNK, chunk, clock, found)


def _prefilled(rig: Rig, name: str, tokens: int, chunk: int, clock: Clock, found: Ceilings) -> PrefillResult:
    few = Clock(clock.device, max(3, clock.reps // 4))
    seq = rig.prompt(tokens)
    seconds = few.wall_s(lambda: rig.prefill(seq, chunk))
    flop = floors.prefill_flop(rig.config, tokens)
    return PrefillResult(name, tokens, chunk, seconds, flop, flop / found.matmul_flop_s, floors.PREFILL_GOAL)


def block_copies(rig: Rig, name: str, clock: Clock, found: Ceilings) -> Iterator[BlockResult]:
    """A quarter of the pool at most, in shuffled order; bytes read and written."""
    pool = rig.cache.pool
    count = max(1, min(rig.num_blocks // 4, (1 << 30) // rig.cache.block_bytes))
    ids = torch.randperm(rig.num_blocks, device=rig.device)
    here, there = ids[:count], ids[count : 2 * count]
    seconds = clock.device_s(lambda: rig.kernels.copy_blocks(pool, here, there))
    yield BlockResult(name, rig.cache.block_bytes, 2 * count * rig.cache.block_bytes, seconds, found.copy_bytes_s)


def draws(clock: Clock, tiny: bool) -> Iterator[DrawResult]:
    """Drawing the tokens of a step, the copy to the host awaited."""
    rows, vocab = (8, 2000) if tiny else (256, 151936)
    logits = torch.randn((rows, vocab), device=clock.device) * 3
    sampler = DeviceSampler(clock.device)
    for kind in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50}):
        params = SamplingParams(max_tokens=1, **kind)
        asked = [Draw(Sequence(Request("r", (1, 2, i), params), 0.0), 0, i) for i in range(rows)]
        yield DrawResult(str(kind), rows, vocab, clock.wall_s(lambda a=asked: sampler.start(logits, a).wait()))
