"""Every kernel against float64 on fresh random inputs: what it must give, how far it was off, what is allowed.

Memory that `torch.empty` hands out is filled with NaN before a kernel gets it, so an output element that it leaves out
is found. A check draws its inputs from the run's seed, which the report names.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from gpucheck import oracle
from gpucheck.oracle import LAYER, Shape, normal

from kvbaton.kernels.backend import MAX_GATHERED_TOKENS, Kernels
from kvbaton.kernels.quantization import FP8, storage, to_kv

# Relative to 1 + |wanted|. Rounding of the result alone is 4e-3 in bfloat16 and 5e-4 in float16.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, FP8: 0.0}
EXACT = 0.0


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the checks run."""

    device: torch.device
    kernels: Kernels
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Outcome:
    error: float
    limit: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    run: Callable[[Bench], Outcome]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`problem` is the traceback of a check that could not finish."""

    name: str
    error: float
    limit: float
    seconds: float
    detail: str = ""
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and self.error <= self.limit  # False for NaN


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is NaN, or the largest integer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def run_check(check: Check, bench: Bench) -> CheckResult:
    began = time.perf_counter()
    try:
        with poisoned(), torch.inference_mode():
            outcome, problem = check.run(bench), None
    except Exception:
        outcome, problem = Outcome(float("nan"), 0.0), traceback.format_exc()
    seconds = time.perf_counter() - began
    return CheckResult(check.name, outcome.error, outcome.limit, seconds, outcome.detail, problem)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to 1 + |want|; NaN where either has one that the other has not."""
    wide = want.double()
    return float(((got.double() - wide).abs() / (1 + wide.abs())).max())


def norms(dtype: torch.dtype, width: int, bench: Bench) -> Outcome:
    x, residual = (normal((33, width), dtype, bench.generator) for _ in range(2))
    weight = normal((width,), dtype, bench.generator)
    heads = normal((33, 7, width + 16), dtype, bench.generator)[:, 2:6, :width]  # strides of their own
    out, total = bench.kernels.add_rms_norm(x, residual, weight, 1e-5)
    errors = [
        distance(bench.kernels.rms_norm(x, weight, 1e-5), _norm(x.double(), weight)),
        distance(bench.kernels.rms_norm(heads, weight, 1e-5), _norm(heads.double(), weight)),
        distance(total, x.double() + residual.double()),
        distance(out, _norm((x + residual).double(), weight)),
    ]
    return Outcome(max(errors), LIMITS[dtype])


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()


def silu(dtype: torch.dtype, width: int, bench: Bench) -> Outcome:
    gate_up = normal((17, 2 * width), dtype, bench.generator) * 4
    gate, up = gate_up.double().chunk(2, -1)
    return Outcome(distance(bench.kernels.silu_mul(gate_up), gate * gate.sigmoid() * up), LIMITS[dtype])


def rope(shape: Shape, half: int, bench: Bench) -> Outcome:
    """Rotated q, the slots of the step, and every other byte of the pool as it was."""
    step = oracle.make_step(shape, bench.generator)
    before = storage(step.pool).clone()
    tokens = step.q.shape[0]
    k, v = (normal((tokens, shape.kv_heads, shape.head_dim), shape.dtype, bench.generator) for _ in range(2))
    angles = normal((max(shape.contexts), half), torch.float32, bench.generator)
    cos, sin = angles.cos(), angles.sin()
    meta = step.meta
    q = bench.kernels.rope_and_write_kv(step.q, k, v, cos, sin, step.pool, LAYER, meta)
    c, s = cos[meta.positions], sin[meta.positions]
    block, offset = meta.slot_mapping // shape.block_size, meta.slot_mapping % shape.block_size
    pool = storage(step.pool)
    written = torch.zeros(before.shape, dtype=torch.bool, device=bench.device)
    written[block, LAYER, :, :, offset] = True
    if not torch.equal(pool[~written].view(torch.uint8), before[~written].view(torch.uint8)):
        return Outcome(float("inf"), EXACT, "bytes outside the step's slots were written")
    if not torch.equal(pool[block, LAYER, 1, :, offset], storage(to_kv(v, shape.pool_dtype))):
        return Outcome(float("inf"), EXACT, "V differs")
    got = pool[block, LAYER, 0, :, offset].view(shape.pool_dtype)
    slack = 0.07 if shape.pool_dtype is FP8 else 0.0  # half a step of e4m3
    turned = oracle.rotation(k, c, s)
    error = max(distance(q, oracle.rotation(step.q, c, s)), distance(got.float(), turned) - slack)
    return Outcome(error, LIMITS[shape.dtype])


def attention(shape: Shape, bench: Bench) -> Outcome:
    step = oracle.make_step(shape, bench.generator)
    scale = shape.head_dim**-0.5
    out = bench.kernels.paged_attention(step.q, step.pool, LAYER, step.meta, scale, shape.window)
    return Outcome(distance(out, oracle.attention(step)), LIMITS[shape.dtype])


def linear_int8(dtype: torch.dtype, outs: int, ins: int, bench: Bench) -> Outcome:
    """Products with 8-bit weights, few rows and many; the same rows alone, which must give the same bits."""
    errors = []
    weight = torch.randint(-127, 128, (outs, ins), dtype=torch.int8, generator=bench.generator, device=bench.device)
    scale = normal((outs,), torch.float32, bench.generator).abs() / 73 / ins**0.5
    bias = normal((outs,), dtype, bench.generator)
    for rows in (1, 5, 33, 64, 65, 300):
        x = normal((rows, ins), dtype, bench.generator)
        got = bench.kernels.linear_int8(x, weight, scale, bias)
        want = x.double() @ weight.double().T * scale.double() + bias.double()
        errors.append(distance(got, want))
    return Outcome(max(errors), max(LIMITS[dtype], 1e-4))  # thousands of terms in float32


def linear_in_company(bench: Bench) -> Outcome:
    """Rows that differ from what they give alone, among up to 64 rows, and among more."""
    weight = torch.randint(-127, 128, (4096, 4096), dtype=torch.int8, generator=bench.generator, device=bench.device)
    scale = normal((4096,), torch.float32, bench.generator).abs() / 5000
    x = normal((700, 4096), torch.bfloat16, bench.generator)
    wrong = 0
    for most, counts in ((64, (1, 16, 17, 33)), (700, (65, 256, 257))):
        together = bench.kernels.linear_int8(x[:most], weight, scale)
        for count in counts:
            wrong += int((bench.kernels.linear_int8(x[:count], weight, scale) != together[:count]).any(-1).sum())
    return Outcome(float(wrong), EXACT)


def flash_prefill(shape: Shape, bench: Bench) -> Outcome:
    """Chunks by torch's flash attention over gathered contexts, decode rows by ours."""
    from kvbaton.kernels.triton_backend import TritonKernels

    step = oracle.make_step(shape, bench.generator)
    kernels, scale = TritonKernels(MAX_GATHERED_TOKENS), shape.head_dim**-0.5
    out = kernels.paged_attention(step.q, step.pool, LAYER, step.meta, scale, shape.window)
    return Outcome(distance(out, oracle.attention(step)), LIMITS[shape.dtype])


def blocks(dtype: torch.dtype, bench: Bench) -> Outcome:
    """Whole blocks, bit for bit, and nothing else."""
    pool = normal((11, 3, 2, 2, 16, 40), torch.float32, bench.generator).to(dtype)
    want = storage(pool).clone()
    ids = torch.randperm(11, generator=bench.generator, device=bench.device)
    bench.kernels.copy_blocks(pool, ids[:4], ids[4:8])
    want[ids[4:8]] = want[ids[:4]]
    return Outcome(float(not torch.equal(storage(pool), want)), EXACT)


_DECODE = Shape((1,) * 6, (1, 63, 256, 257, 1025, 4097))
_MIXED = Shape((1, 1, 5, 300), (700, 64, 90, 555))
_TINY_DECODE = Shape((1,) * 4, (1, 15, 17, 70), heads=4, head_dim=16, block_size=16, dtype=torch.float32)
_TINY_MIXED = replace(_TINY_DECODE, queries=(1, 1, 5, 30), contexts=(40, 16, 9, 55))


def kernel_checks(tiny: bool) -> Iterator[Check]:
    """`tiny`: shapes that a CPU does in a moment, to try the harness out."""
    decode, mixed = (_TINY_DECODE, _TINY_MIXED) if tiny else (_DECODE, _MIXED)
    dtypes = (torch.float32,) if tiny else (torch.float32, torch.bfloat16, torch.float16)
    for dtype in dtypes:
        for width in (96, 1100) if tiny else (128, 1100, 4096):
            yield Check(f"norms {width} {_name(dtype)}", partial(norms, dtype, width))
        yield Check(f"silu_mul {_name(dtype)}", partial(silu, dtype, 200 if tiny else 12288))
        for outs, ins in ((40, 1100),) if tiny else ((70, 1100), (4096, 14336)):
            yield Check(f"product {outs} x {ins} int8 {_name(dtype)}", partial(linear_int8, dtype, outs, ins))
        yield Check(f"rope + kv write {_name(dtype)}", partial(rope, replace(mixed, dtype=dtype), mixed.head_dim // 2))
        yield Check(f"decode attention {_name(dtype)}", partial(attention, replace(decode, dtype=dtype)))
        yield Check(f"mixed attention {_name(dtype)}", partial(attention, replace(mixed, dtype=dtype)))
    yield from _special_shapes(decode, mixed, tiny)
    for dtype in (*dtypes, *(() if tiny else (FP8,))):
        yield Check(f"copy blocks {_name(dtype)}", partial(blocks, dtype))


def _special_shapes(decode: Shape, mixed: Shape, tiny: bool) -> Iterator[Check]:
    yield Check("partial rotary", partial(rope, mixed, mixed.head_dim // 8))
    yield Check("window", partial(attention, replace(mixed, window=24)))
    yield Check("decode under a window", partial(attention, replace(decode, window=50 if tiny else 600)))
    if tiny:
        return
    long = Shape((1, 1), (17000, 5), heads=4, kv_heads=1)
    yield Check("decode, more tokens than splits", partial(attention, long))
    yield Check("prefill 1024", partial(attention, Shape((1024,), (1024,), heads=4, kv_heads=1)))
    yield Check("seven heads a group", partial(attention, replace(_MIXED, heads=14, head_dim=64, block_size=16)))
    yield Check("head_dim 80", partial(attention, replace(_MIXED, heads=4, kv_heads=4, head_dim=80, block_size=64)))
    yield Check("head_dim 256", partial(attention, replace(_MIXED, heads=4, head_dim=256)))
    yield Check("int8 rows alone and in company", linear_in_company)
    yield Check("flash prefill", partial(flash_prefill, _MIXED))
    yield Check("flash prefill, window, 8-bit pool", partial(flash_prefill, replace(_MIXED, window=24, kv_dtype=FP8)))
    yield Check("8-bit pool, write", partial(rope, replace(_MIXED, kv_dtype=FP8), 64))
    yield Check("8-bit pool, decode", partial(attention, replace(_DECODE, kv_dtype=FP8)))
    yield Check("8-bit pool, mixed", partial(attention, replace(_MIXED, kv_dtype=FP8)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
