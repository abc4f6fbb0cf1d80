"""The seam between the engine and the device: what each kind of device computes with, and which kernels those are.

`Kernels` serves the decoder, `DrawKernels` (in `draw`) the sampler.

`num_tokens` rows of a ragged batch, `num_heads` query heads, `num_kv_heads` of K and V. The KV pool is one tensor
`kv_cache [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` with K at index 0 and V at 1.
"""

from __future__ import annotations

from typing import Protocol

import torch

from kvbaton.kernels.draw import DrawKernels, TorchDraw
from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.quantization import FP8

MAX_GATHERED_TOKENS = 1 << 16  # of a step's contexts, for torch's flash attention; with more, Triton's kernel runs


class Kernels(Protocol):
    """What a decoder layer needs. No method keeps its arguments; only those that say so write to one."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., hidden] -> the same shape; also used over head_dim on [num_tokens, num_heads, head_dim] views."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), each [num_tokens, hidden]."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * intermediate] -> silu(first half) * second half."""
        ...

    def linear_int8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [rows, in] times the transpose of weight [out, in] int8, times scale [out] float32, plus bias [out].

        [rows, out] in x's dtype. Products are those of x and exact integers, summed in float32; scale and bias come
        after the sum, and the result is rounded once.
        """
        ...

    def rope_and_write_kv(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        meta: AttentionMeta,
    ) -> torch.Tensor:
        """Rotate q [num_tokens, num_heads, head_dim] and k by cos/sin [max_position, rotary_dim / 2]; return the new q.

        Writes rotated k and v [num_tokens, num_kv_heads, head_dim] to the slots of `meta` in `kv_cache`.
        """
        ...

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Causal attention of q [num_tokens, num_heads, head_dim] over the pool, decode rows and chunks mixed."""
        ...

    def copy_blocks(self, kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        """Copy block src_ids[i] to dst_ids[i]; no destination occurs twice or among the sources."""
        ...


def kernels_for(device: torch.device, kv_dtype: torch.dtype | None = None, flash_prefill: bool = False) -> Kernels:
    """Triton on CUDA, the measured CPU path elsewhere. Triton is imported only where it will run.

    `kv_dtype` is the pool's where it is not the model's; 8-bit floats on the CPU, for tests, run on the reference.
    `flash_prefill`: on CUDA, prompt chunks attend by torch's flash attention instead of ours.
    """
    if device.type == "cuda":
        from kvbaton.kernels.triton_backend import TritonKernels

        return TritonKernels(MAX_GATHERED_TOKENS if flash_prefill else 0)
    if device.type == "cpu" and kv_dtype is FP8:
        from kvbaton.kernels import reference

        return reference
    if device.type == "cpu":
        from kvbaton.kernels.cpu import CpuKernels, native_attention

        return CpuKernels(native_attention())
    raise ValueError(f"no kernels for device {device}: use cpu or cuda")


def draw_kernels_for(device: torch.device) -> DrawKernels:
    """Triton on CUDA, torch elsewhere."""
    if device.type == "cuda":
        from kvbaton.kernels import triton_draw

        return triton_draw
    return TorchDraw()
