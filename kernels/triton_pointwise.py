# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Row-wise Triton kernels: RMSNorm, with and without the residual sum, and SiLU times gate.

Everything is computed in float32 and rounded where the reference rounds. A program owns ROWS whole rows, so a row's sum
is taken in the same order whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SILU_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class RowTile:
    """ROWS x BLOCK elements a program; narrow rows (a head's q or k norm) share one."""

    rows: int
    block: int
    num_warps: int

    @classmethod
    def of(cls, width: int) -> RowTile:
        block = triton.next_power_of_2(width)
        rows = max(1, 1024 // block)
        return cls(rows, block, min(16, max(4, rows * block // 1024)))


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [num_tokens, heads, width], width contiguous
    weight_ptr,  # [width]
    out_ptr,  # [num_tokens, heads, width] contiguous
    x_token_stride,
    x_head_stride,
    num_rows,
    heads,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (col < width)[None, :]
    source = (row // heads) * x_token_stride + (row % heads) * x_head_stride
    x = tl.load(x_ptr + source[:, None] + col[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    normed = (x * scale[:, None]).to(dtype).to(tl.float32) * weight[None, :]
    tl.store(out_ptr + row[:, None] * width + col[None, :], normed.to(dtype), mask=mask)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,  # [num_rows, width], width contiguous
    residual_ptr,  # [num_rows, width], width contiguous
    weight_ptr,  # [width]
    out_ptr,  # [num_rows, width] contiguous
    total_ptr,  # [num_rows, width] contiguous
    x_stride,
    residual_stride,
    num_rows,
    width,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (col < width)[None, :]
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask=mask, other=0.0)
    rounded = (x + residual.to(tl.float32)).to(dtype)
    target = row[:, None] * width + col[None, :]
    tl.store(total_ptr + target, rounded, mask=mask)
    total = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=1) / width + eps)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    normed = (total * scale[:, None]).to(dtype).to(tl.float32) * weight[None, :]
    tl.store(out_ptr + target, normed.to(dtype), mask=mask)


@triton.jit
def silu_mul_kernel(
    gate_up_ptr,  # [num_tokens, 2 * width], the last dim contiguous
    out_ptr,  # [num_tokens, width] contiguous
    row_stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate_ptr = gate_up_ptr + row * row_stride + col
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    gated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + col, (gated * up).to(dtype), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [num_tokens, width] or [num_tokens, heads, width], the last dim contiguous -> a contiguous tensor like it."""
    grouped = x if x.dim() == 3 else x.unsqueeze(1)
    tokens, heads, width = grouped.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = RowTile.of(width)
    grid = (triton.cdiv(tokens * heads, tile.rows),)
    if tokens:
        rms_norm_kernel[grid](
            grouped, weight, out, grouped.stride(0), grouped.stride(1), tokens * heads, heads, width, eps,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and residual [num_tokens, width] -> (norm of the sum, the sum)."""
    tokens, width = x.shape
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    tile = RowTile.of(width)
    if tokens:
        add_rms_norm_kernel[(triton.cdiv(tokens, tile.rows),)](
            x, residual, weight, out, total, x.stride(0), residual.stride(0), tokens, width, eps,
            ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
        )  # fmt: skip
    return out, total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [num_tokens, 2 * width] -> [num_tokens, width]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        grid = (tokens, triton.cdiv(width, SILU_BLOCK))
        silu_mul_kernel[grid](gate_up, out, gate_up.stride(0), width, BLOCK=SILU_BLOCK, num_warps=4)
    return out
