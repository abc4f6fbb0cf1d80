"""The engine's fast paths against its plain ones: graphs, draws on the device, whole models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from gpucheck.checks import EXACT, Bench, Check, Outcome, distance
from gpucheck.floors import models

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.chunk_size import chunk_sizes
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.greedy import generate
from kvbaton.engine.model import moe as experts_module
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.loader import LoadedModel, random_model, resolve_dtype
from kvbaton.engine.model.model_config import ModelConfig, MoeConfig
from kvbaton.engine.model.weights import empty_weights, slots
from kvbaton.engine.orders import LegKind, Submit, Submitted
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.engine.sampling.sampler import Draw, sample_tokens
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.backend import kernels_for
from kvbaton.kernels.meta import build_attention_meta

CPU = torch.device("cpu")
PROMPTS = ((5, 9, 2), tuple(range(7, 90)), tuple(range(300, 20, -7)), tuple(range(40)))
KINDS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "top_k": 300, "top_p": 0.95},
)


def small_config(moe: bool = False) -> ModelConfig:
    """Qwen3's family, of a size that the CPU computes in float32 in a moment."""
    config = replace(
        models()["Qwen3-0.6B"], vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=32, sliding_windows=(None, 40, None), max_position_embeddings=512, dtype="float32",
    )  # fmt: skip
    return replace(config, moe=MoeConfig(8, 2, 64, True, frozenset({1, 2}))) if moe else config


def logits_equal_cpu(dtype: str, limit: float, bench: Bench) -> Outcome:
    """Teacher-forced: one prompt, every position's logits, relative to their size."""
    prompt = list(PROMPTS[1])
    rows = []
    for device, decoder in ((CPU, _small().decoder), (bench.device, _copied(bench.device, dtype).decoder)):
        config = decoder.config
        shape = (6, config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
        pool = torch.zeros(shape, dtype=decoder.dtype, device=device)
        meta = build_attention_meta([len(prompt)], [len(prompt)], [range(6)], 16, device, 0)
        hidden = decoder.forward(torch.tensor(prompt, device=device), pool, meta)
        rows.append(decoder.logits(hidden).cpu().double())
    want, got = rows
    return Outcome(float((got - want).norm() / want.norm()), limit)


def engine_tokens(cuda_graphs: bool, kv_dtype: str, bench: Bench) -> Outcome:
    """Greedy tokens of a batch that prefills in chunks and decodes together; wrong ones are counted.

    In float32 with a full-precision pool they equal the CPU's; an 8-bit pool is compared with itself, without graphs.
    """
    got = _tokens(bench.device, cuda_graphs, kv_dtype)
    if kv_dtype != "auto":
        want = _tokens(bench.device, False, kv_dtype)
    else:
        plain = _small().decoder
        want = [list(generate(plain, [prompt], 16)[0].tokens) for prompt in PROMPTS]
    return Outcome(float(sum(a != b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))), EXACT)


def _tokens(device: torch.device, cuda_graphs: bool, kv_dtype: str) -> list[list[int]]:
    cache = CacheConfig(16, kv_memory_bytes=4 << 20, kv_dtype=kv_dtype)
    config = EngineConfig(Path(), str(device), "float32", 512, cache=cache, batch=BatchConfig(max_running=4))
    engine = Engine(replace(config, cuda_graphs=cuda_graphs), _copied(device, "float32"), device)
    seqs = [Sequence(Request("r", p, SamplingParams(max_tokens=16, temperature=0.0)), 0.0) for p in PROMPTS]
    for seq in seqs:
        seq.block_table = engine.kv.allocate(8)
    for chunk in (3, 40, 200):
        _step(engine, [(seq, min(chunk, seq.num_uncomputed)) for seq in seqs if seq.num_computed < seq.num_prompt])
    while running := [seq for seq in seqs if seq.num_outputs < 16]:
        _step(engine, [(seq, 1) for seq in running])
    return [seq.tokens[seq.num_prompt :] for seq in seqs]


def overlapping_tokens(bench: Bench) -> Outcome:
    """Requests through a worker whose steps overlap, against the same with each step on its own; wrong ones counted."""
    got, want = (_served(bench.device, way) for way in ("on", "off"))
    return Outcome(float(sum(got.get(key) != token for key, token in want.items()) + len(got.keys() - want)), EXACT)


def _served(device: torch.device, pipelined: str) -> dict[tuple[str, int], int | None]:
    """Tokens by request and index: greedy ones and sampled ones, some of which stop early, in chunks of 40."""
    cache = CacheConfig(16, kv_memory_bytes=4 << 20)
    batch = BatchConfig(prefill_chunk_tokens=40, max_running=8)
    config = EngineConfig(Path(), str(device), "float32", 512, cache=cache, batch=batch, pipelined=pipelined)
    worker = Worker(Engine(config, _copied(device, "float32"), device), None, batch)  # type: ignore[arg-type]
    for i, prompt in enumerate(PROMPTS):
        for kind in ({"temperature": 0.0}, {"seed": i, "top_p": 0.9}):
            sampling = SamplingParams(max_tokens=16 + i, stop_token_ids=tuple(range(0, 512, 37)), **kind)
            name = f"{i}-{len(kind)}"
            worker.handle(Submitted(1, Submit(Request(name, prompt, sampling), LegKind.LOCAL)), 0.0)
        worker.step(0.0)
    while worker.step(0.0):
        pass
    return {(o.request_id, o.index): o.token_id for outputs in worker.take_outputs().values() for o in outputs}


def measured_chunk(bench: Bench) -> Outcome:
    """An engine that times itself at its start: it chooses a size that it tried, and has all of its blocks."""
    cache = CacheConfig(16, kv_memory_bytes=4 << 20)
    batch = BatchConfig(prefill_chunk_tokens="auto", max_running=4)
    config = EngineConfig(Path(), str(bench.device), "float32", 512, cache=cache, batch=batch)
    engine = Engine(config, _copied(bench.device, "float32"), bench.device)
    chosen, sizes = engine.limits.chunk_tokens, chunk_sizes(512)
    right = chosen in sizes and engine.kv.counts().free == engine.kv.num_blocks
    return Outcome(float(not right), EXACT, f"{chosen} of {sizes}")


def _step(engine: Engine, parts: list[tuple[Sequence, int]]) -> None:
    rows = [ScheduledRow(seq, n, (0,) if seq.num_computed + n == len(seq.tokens) else ()) for seq, n in parts if n]
    if not rows:
        return
    for row, drawn in zip(rows, engine.launch(rows).wait().sampled, strict=True):
        row.seq.num_computed += row.num_tokens
        row.seq.tokens.extend(one.token_id for one in drawn)


def _small() -> LoadedModel:
    """Its weights are drawn on the CPU: generators of another device give other numbers."""
    return random_model(small_config(), 3, CPU, "float32")


def _copied(device: torch.device, dtype: str) -> LoadedModel:
    source = _small()
    weights = empty_weights(source.config, resolve_dtype(source.config, dtype), device)
    pairs = zip(slots(source.config, weights), slots(source.config, source.decoder.weights), strict=True)
    for target, own in pairs:
        target.target.copy_(own.target)
    return LoadedModel(source.config, Decoder(source.config, weights, kernels_for(device)), source.fingerprint)


def experts(bench: Bench) -> Outcome:
    """The grouped product against one product an expert, both in bfloat16 on the device."""
    model = random_model(small_config(moe=True), 5, bench.device, "bfloat16")
    layer, moe = model.decoder.weights.layers[1].mlp, model.config.moe
    if not experts_module.runs_without_host_sync(layer.gate_up):
        return Outcome(0.0, EXACT, "no grouped product on this device: nothing compared")
    x = torch.randn((70, 64), generator=bench.generator, device=bench.device).bfloat16()
    _, chosen = experts_module.route(x, layer.router, moe)
    by_expert, order = chosen.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, torch.arange(8, device=bench.device), right=True, out_int32=True)
    grouped = x[order // 2]
    got, want = (
        run(grouped, ends, layer, bench.kernels)
        for run in (experts_module.grouped_product, experts_module.product_per_expert)
    )
    return Outcome(distance(got, want), 5e-2)  # two roundings to bfloat16, summed in another order


def draws(vocab: int, kind: dict[str, float], bench: Bench) -> Outcome:
    """Tokens drawn on the device against the sampler on the CPU: same keys, same cuts. Wrong ones are counted."""
    logits = torch.randn((16, vocab), generator=bench.generator, device=bench.device) * 3
    asked = [
        Draw(Sequence(Request("r", (1,) * (3 + i), SamplingParams(max_tokens=1, seed=i << 33, **kind)), 0.0), i % 3, i)
        for i in range(16)
    ]
    got = DeviceSampler(bench.device).start(logits, asked).wait()
    want = [one.token_id for one in sample_tokens(logits.cpu(), asked)]
    return Outcome(float(sum(a != b for a, b in zip(got, want, strict=True))), EXACT)


def model_checks(tiny: bool) -> Iterator[Check]:
    vocab = 3000 if tiny else 151936
    for kind in KINDS:
        yield Check(f"draws {kind}", partial(draws, vocab, kind))
    yield Check("logits float32 = CPU", partial(logits_equal_cpu, "float32", 1e-4))
    yield Check("logits bfloat16 = CPU", partial(logits_equal_cpu, "bfloat16", 0.1))
    for graphs in (False, True):
        yield Check(f"tokens float32, {'graphs' if graphs else 'eager'}", partial(engine_tokens, graphs, "auto"))
    yield Check("chunk size measured at start", measured_chunk)
    yield Check("tokens of overlapping steps", overlapping_tokens)
    yield Check("tokens, 8-bit pool, graphs", partial(engine_tokens, True, "fp8_e4m3"))
    yield Check("experts", experts)
