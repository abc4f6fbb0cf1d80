# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Matrix product with 8-bit integer weights: y = (x Wq^T) * scale + bias, one scale an output, float32 sums.

    grid (row tile, output tile, part of the inputs) -> y, or float32 sums of the part
    grid (row, output tile)                          -> y from the sums, part by part

A weight is read as 8 bits and widened in registers, which is exact in every float dtype, so a step reads half of what
16-bit weights would take. The weights are the left operand: Hopper's matrix instructions take that one from registers,
so the widened values need not pass through shared memory.

Up to FEW_ROWS rows (decode, where reading the weights is all of the time) the inputs are cut into parts where there are
too few output tiles to keep the device busy. The cut depends on the weight's shape alone, and parts are added in order:
a row gives the same bits in every batch of up to FEW_ROWS rows. In larger batches nothing is cut; a row gives the same
bits in all of these, and may differ in the last ones from its result among few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

FEW_ROWS = 64
BUSY_PROGRAMS = 256  # nearly two for each of Hopper's 132 processors
LEAST_PART = 512
MAX_PARTS = 16
REDUCE_OUTS = 1024


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Rows, outputs and inputs of one tile, and how a program is built."""

    rows: int
    outs: int
    ins: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, rows: int, dtype: torch.dtype) -> LinearTile:
        if dtype == torch.float32:  # no tensor cores: operands sit in registers, and larger tiles spill
            return cls(16, 32, 32, 4, 2)
        if rows <= FEW_ROWS:
            return cls(max(16, triton.next_power_of_2(rows)), 64, 128, 4, 4)
        return cls(128, 64, 64, 4, 4) if rows <= 256 else cls(128, 128, 64, 8, 4)


@triton.jit
def linear_int8_kernel(
    x_ptr,  # [rows, in_width], in_width contiguous
    quantized_ptr,  # [out_width, in_width] int8, contiguous
    scale_ptr,  # [out_width] float32
    bias_ptr,  # [out_width], read where HAS_BIAS
    out_ptr,  # [rows, out_width] contiguous, written where SINGLE
    part_ptr,  # [parts, rows, out_width] float32, written where not
    x_row_stride,
    rows,
    out_width,
    in_width,
    part_width,
    SINGLE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,  # no tile reaches past in_width
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
):
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    lane = tl.arange(0, INS)
    row_ok, col_ok = row < rows, col < out_width
    x_at = x_ptr + row.to(tl.int64)[None, :] * x_row_stride + lane[:, None]
    w_at = quantized_ptr + col.to(tl.int64)[:, None] * in_width + lane[None, :]
    low = part * part_width
    high = tl.minimum(low + part_width, in_width)
    acc = tl.zeros([OUTS, ROWS], tl.float32)
    for start in range(low, high, INS):
        w_ok, x_ok = col_ok[:, None], row_ok[None, :]
        if not WHOLE:
            in_ok = lane < high - start
            w_ok, x_ok = w_ok & in_ok[None, :], x_ok & in_ok[:, None]
        w = tl.load(w_at + start, mask=w_ok, other=0)
        x = tl.load(x_at + start, mask=x_ok, other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    at = row.to(tl.int64)[None, :] * out_width + col[:, None]
    mask = col_ok[:, None] & row_ok[None, :]
    if SINGLE:
        acc = acc * tl.load(scale_ptr + col, mask=col_ok, other=0.0)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + col, mask=col_ok, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(part_ptr + part.to(tl.int64) * rows * out_width + at, acc, mask=mask)


@triton.jit
def linear_int8_reduce_kernel(
    part_ptr,  # [parts, rows, out_width] float32
    scale_ptr,  # [out_width] float32
    bias_ptr,  # [out_width], read where HAS_BIAS
    out_ptr,  # [rows, out_width] contiguous
    rows,
    out_width,
    parts,
    HAS_BIAS: tl.constexpr,
    OUTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    ok = col < out_width
    acc = tl.zeros([OUTS], tl.float32)
    for part in range(parts):
        acc += tl.load(part_ptr + (part * rows + row) * out_width + col, mask=ok, other=0.0)
    acc = acc * tl.load(scale_ptr + col, mask=ok, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + col, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_width + col, acc.to(out_ptr.dtype.element_ty), mask=ok)


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, in], the last dim contiguous; weight [out, in] int8 and scale [out] float32, both contiguous; bias [out]
    in any float dtype -> [rows, out] in x's dtype. Waits for nothing, so a graph can capture it.

    Raises ValueError where the shapes do not fit together.
    """
    (rows, in_width), (out_width, own_width) = x.shape, weight.shape
    if own_width != in_width or scale.shape != (out_width,) or weight.dtype != torch.int8:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} {weight.dtype}, scale {tuple(scale.shape)}"
        raise ValueError(f"not one product: {shapes}")
    out = torch.empty((rows, out_width), dtype=x.dtype, device=x.device)
    if not rows:
        return out
    tile = LinearTile.of(rows, x.dtype)
    part_width = _part_width(in_width, out_width, tile) if rows <= FEW_ROWS else in_width
    parts = triton.cdiv(in_width, part_width)
    sums = out if parts == 1 else torch.empty((parts, rows, out_width), dtype=torch.float32, device=x.device)
    shift = scale if bias is None else bias
    linear_int8_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(out_width, tile.outs), parts)](
        x, weight, scale, shift, out, sums, x.stride(0), rows, out_width, in_width, part_width,
        SINGLE=parts == 1, HAS_BIAS=bias is not None, WHOLE=in_width % tile.ins == 0, ROWS=tile.rows, OUTS=tile.outs,
        INS=tile.ins, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if parts > 1:
        linear_int8_reduce_kernel[(rows, triton.cdiv(out_width, REDUCE_OUTS))](
            sums, scale, shift, out, rows, out_width, parts,
            HAS_BIAS=bias is not None, OUTS=REDUCE_OUTS, num_warps=4,
        )  # fmt: skip
    return out


def _part_width(in_width: int, out_width: int, tile: LinearTile) -> int:
    """Inputs of one part, a multiple of a tile's: as many parts as make BUSY_PROGRAMS, none smaller than LEAST_PART."""
    tiles = -(-out_width // tile.outs)
    parts = max(1, min(-(-BUSY_PROGRAMS // tiles), in_width // LEAST_PART, MAX_PARTS))
    return -(-in_width // (parts * tile.ins)) * tile.ins
