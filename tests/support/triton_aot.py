# mypy: allow-untyped-calls
"""Compiles every Triton kernel for sm_90 without a GPU and reports what ptxas made of it.

    PYTHONPATH=src python tests/support/triton_aot.py

Registers and spills come from ptxas on Triton's PTX, shared memory from Triton's own metadata. The shapes are those of
real models, so that a change which starts to spill, or no longer fits an SM, is seen on any machine.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvbaton.kernels import (
    triton_copy,
    triton_decode,
    triton_draw,
    triton_linear,
    triton_pointwise,
    triton_prefill,
    triton_rope,
)
from kvbaton.kernels.quantization import FP8

TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT_BYTES = 227 * 1024
TYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", FP8: "fp8e4nv"}
INDEX_POINTERS = {
    "tables_ptr": "i32",
    "lens_ptr": "i32",
    "cu_ptr": "i32",
    "positions_ptr": "i64",
    "slots_ptr": "i64",
    "src_ids_ptr": "i64",
    "dst_ids_ptr": "i64",
    "part_ptr": "fp32",
    "stats_ptr": "fp32",
    "cos_ptr": "fp32",
    "sin_ptr": "fp32",
    "logits_ptr": "fp32",
    "top_ptr": "fp32",
    "seeds_ptr": "i64",
    "samples_ptr": "i64",
    "least_ptr": "i64",
    "token_ptr": "i64",
    "token_ids_ptr": "i64",
    "drawn_ptr": "i64",
    "sum_ptr": "i64",
    "temperature_ptr": "fp64",
    "min_p_ptr": "fp64",
    "best_ptr": "fp64",
    "quantized_ptr": "i8",
    "scale_ptr": "fp32",
}
ALIGNED = ("_ptr", "token_stride", "head_stride", "block_stride", "row_stride", "width", "block_elements")
LINEAR_ROWS = (1, 64, 256, 2048)  # a product of 8-bit weights has tiles of its own for each
FLOAT_SCALARS = ("eps", "scale_log2")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One kernel at one shape: its constants, the dtype of its data pointers, and how it is launched. `kv_dtype` is
    that of the pool where it is another one."""

    label: str
    kernel: Any
    dtype: torch.dtype
    constants: tuple[tuple[str, int | bool], ...]
    num_warps: int
    num_stages: int = 3
    kv_dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """What the compilers say about one spec."""

    label: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The part of a model that its kernels are compiled for."""

    label: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype: torch.dtype
    block_size: int = 32
    window: bool = False
    kv_dtype: torch.dtype | None = None


MODELS = (
    ModelShape("llama-8b", 32, 8, 128, 4096, torch.bfloat16),
    ModelShape("mistral-window", 32, 8, 128, 4096, torch.bfloat16, window=True),
    ModelShape("qwen2-0.5b", 14, 2, 64, 896, torch.float16, block_size=16),
    ModelShape("mha-d80", 16, 16, 80, 1280, torch.bfloat16, block_size=64),
    ModelShape("head-256", 16, 8, 256, 3584, torch.bfloat16),
    ModelShape("llama-8b-fp8-kv", 32, 8, 128, 4096, torch.bfloat16, kv_dtype=FP8),
    ModelShape("fp32-d128", 32, 8, 128, 4096, torch.float32),
)


def attention_specs(model: ModelShape) -> Iterator[KernelSpec]:
    """Decode, its reduction, and prefill."""
    group, dim_pad = model.heads // model.kv_heads, triton.next_power_of_2(model.head_dim)
    shared = (("HAS_WINDOW", model.window), ("HEAD_DIM", model.head_dim), ("DIM_PAD", dim_pad))
    pool = (("GROUP", group), ("KV_HEADS", model.kv_heads), ("BLOCK_SIZE", model.block_size))
    split = (("MIN", triton_decode.MIN_SPLIT), ("MAX", triton_decode.MAX_SPLITS))
    decode = triton_decode.DecodeTile.of(group, model.head_dim, model.dtype)
    tile = (("BLOCK_M", decode.block_m), ("BLOCK_N", decode.block_n))
    whole = (*shared, *pool, *split, *tile, ("SINGLE", False))
    yield KernelSpec(
        "decode",
        triton_decode.decode_split_kernel,
        model.dtype,
        whole,
        decode.num_warps,
        decode.num_stages,
        model.kv_dtype,
    )
    reduce = (*shared, *split, ("BLOCK_N", decode.block_n), ("SPLITS", triton_decode.REDUCE_SPLITS))
    yield KernelSpec("decode reduce", triton_decode.decode_reduce_kernel, model.dtype, reduce, 4)
    prefill = triton_prefill.PrefillTile.of(group, model.head_dim, model.dtype)
    constants = (*shared, *pool, ("BLOCK_M", prefill.block_m), ("BLOCK_N", prefill.block_n))
    yield KernelSpec(
        "prefill",
        triton_prefill.prefill_kernel,
        model.dtype,
        constants,
        prefill.num_warps,
        prefill.num_stages,
        model.kv_dtype,
    )


def gather_spec(model: ModelShape) -> KernelSpec:
    """K and V of contexts as rows."""
    sizes = (("KV_HEADS", model.kv_heads), ("HEAD_DIM", model.head_dim), ("BLOCK_SIZE", model.block_size))
    padded = (("DIM_PAD", triton.next_power_of_2(model.head_dim)), ("TOKENS", triton_copy.TOKENS))
    kernel = triton_copy.gather_context_kernel
    return KernelSpec("gather context", kernel, model.dtype, (*sizes, *padded), 4, kv_dtype=model.kv_dtype)


def layer_specs(model: ModelShape) -> Iterator[KernelSpec]:
    """Everything of a layer but attention."""
    row = triton_pointwise.RowTile.of(model.hidden)
    rows = (("ROWS", row.rows), ("BLOCK", row.block))
    yield KernelSpec("rms_norm", triton_pointwise.rms_norm_kernel, model.dtype, rows, row.num_warps)
    yield KernelSpec("add_rms_norm", triton_pointwise.add_rms_norm_kernel, model.dtype, rows, row.num_warps)
    silu = (("BLOCK", triton_pointwise.SILU_BLOCK),)
    yield KernelSpec("silu_mul", triton_pointwise.silu_mul_kernel, model.dtype, silu, 4)
    yield rope_spec(model)
    copy = (("CHUNK", triton_copy.CHUNK),)
    yield KernelSpec("copy blocks", triton_copy.copy_blocks_kernel, model.dtype, copy, 8)


def rope_spec(model: ModelShape) -> KernelSpec:
    """Rotation and the write to the pool."""
    half = model.head_dim // 2
    rope = (
        ("KV_HEADS", model.kv_heads),
        ("HEAD_DIM", model.head_dim),
        ("HALF", half),
        ("BLOCK_SIZE", model.block_size),
        ("HEADS_TILE", triton_rope.HEADS),
        ("HALF_PAD", triton.next_power_of_2(half)),
        ("TAIL_PAD", 0),
        ("DIM_PAD", triton.next_power_of_2(model.head_dim)),
    )
    return KernelSpec("rope + kv write", triton_rope.rope_write_kernel, model.dtype, rope, 4, kv_dtype=model.kv_dtype)


def linear_specs(model: ModelShape, general: bool) -> Iterator[KernelSpec]:
    """Products with 8-bit weights, with and without a sum over parts, for few rows and for many. `general`: with a
    bias, and of a width that no tile divides."""
    kernel, tiles = triton_linear.linear_int8_kernel, dict[triton_linear.LinearTile, int]()
    for rows in LINEAR_ROWS:
        tiles.setdefault(triton_linear.LinearTile.of(rows, model.dtype), rows)
    for tile, rows in tiles.items():
        sizes = (("ROWS", tile.rows), ("OUTS", tile.outs), ("INS", tile.ins))
        for single in (True, False) if rows <= triton_linear.FEW_ROWS else (True,):
            label = f"linear int8, {rows} rows{'' if single else ', parts'}"
            constants = (("SINGLE", single), ("HAS_BIAS", general), ("WHOLE", not general), *sizes)
            yield KernelSpec(label, kernel, model.dtype, constants, tile.num_warps, tile.num_stages)
    reduce = (("HAS_BIAS", general), ("OUTS", triton_linear.REDUCE_OUTS))
    yield KernelSpec("linear int8 reduce", triton_linear.linear_int8_reduce_kernel, model.dtype, reduce, 4)


def draw_specs() -> Iterator[KernelSpec]:
    """Drawing tokens; the same for every model."""
    warps, chunk = triton_draw.NUM_WARPS, ("CHUNK", triton_draw.CHUNK)
    for label, random, cuts in (("argmax", False, False), ("draw", True, False), ("draw with cuts", True, True)):
        constants = (("RANDOM", random), ("CUTS", cuts), chunk)
        yield KernelSpec(label, triton_draw.draw_kernel, torch.float32, constants, warps)
    yield KernelSpec("total weight", triton_draw.total_weight_kernel, torch.float32, (chunk,), warps)
    rows = (("ROWS", triton_draw.FILL_ROWS),)
    yield KernelSpec("fill tokens", triton_draw.fill_tokens_kernel, torch.float32, rows, triton_draw.FILL_WARPS)


def compile_spec(spec: KernelSpec) -> CompiledKernel:
    """Raises Triton's or ptxas's own error where the kernel does not compile."""
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(_source(spec), target=TARGET, options=options)
    registers, spills = _ptxas(compiled.asm["ptx"])
    return CompiledKernel(spec.label, registers, spills, compiled.metadata.shared, spec.num_warps)


def _source(spec: KernelSpec) -> Any:
    """Alignment as the launcher sees it in real models: pointers, row strides and widths are multiples of 16."""
    constants = dict(spec.constants)
    signature = {name: _argument_type(name, spec) for name in spec.kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith(ALIGNED)}
    return ASTSource(fn=spec.kernel, signature=signature, constexprs=constants, attrs=aligned)


def _argument_type(name: str, spec: KernelSpec) -> str:
    if name in dict(spec.constants):
        return "constexpr"
    if name.endswith("_ptr"):
        own = spec.kv_dtype if name == "layer_ptr" and spec.kv_dtype else spec.dtype
        return "*" + INDEX_POINTERS.get(name, TYPE_NAMES[own])
    return "fp32" if name in FLOAT_SCALARS else "i32"


def _ptxas(ptx: str) -> tuple[int, int]:
    """(registers a thread, bytes spilled a thread) of the one kernel in `ptx`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(_newest_ptxas()), "-v", "-arch=sm_90a", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", run.stderr)
    if run.returncode or registers is None or spills is None:
        raise RuntimeError(f"ptxas failed with status {run.returncode}: {run.stderr.strip()}")
    return int(registers[1]), int(spills[1]) + int(spills[2])


@functools.cache
def _newest_ptxas() -> Path:
    """Triton ships several; the newest reads the PTX of all."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return max(folder.glob("ptxas*"), key=_version)


def _version(binary: Path) -> tuple[int, ...]:
    banner = subprocess.run([str(binary), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", banner)
    return tuple(map(int, release.groups())) if release else ()


def all_specs(models: Sequence[ModelShape]) -> Iterator[KernelSpec]:
    """Attention at every model's shape, writes where the pool's dtype is its own, the rest at the first model's shape
    and at the float32 one's."""
    for i, model in enumerate(models):
        specs = list(attention_specs(model))
        if i == 0:
            specs += draw_specs()
        if i == 0 or model.dtype == torch.float32:
            specs += [*layer_specs(model), *linear_specs(model, general=i > 0), gather_spec(model)]
        elif model.kv_dtype is not None:
            specs += [rope_spec(model), gather_spec(model)]
        for spec in specs:
            yield replace(spec, label=f"{model.label} {spec.label}")


def main() -> None:
    write = sys.stdout.write
    write(f"{'kernel (sm_90)':34} {'warps':>5} {'registers':>9} {'spill B':>8} {'shared B':>9}\n")
    for k in map(compile_spec, all_specs(MODELS)):
        write(f"{k.label:34} {k.num_warps:5} {k.registers:9} {k.spill_bytes:8} {k.shared_bytes:9}\n")


if __name__ == "__main__":
    main()
