"""The CPU back end."""

from __future__ import annotations

import torch

from kvbaton.kernels import reference
from kvbaton.kernels.meta import AttentionMeta


class CpuKernels:
    """`Kernels` on the CPU."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return reference.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return reference.silu_mul(gate_up)

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
        return reference.rope_and_write_kv(q, k, v, cos, sin, kv_cache, layer, meta)

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        return reference.paged_attention(q, kv_cache, layer, meta, scale, sliding_window)

    def gather_blocks(self, kv_cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
        return reference.gather_blocks(kv_cache, block_ids)

    def scatter_blocks(self, staging: torch.Tensor, kv_cache: torch.Tensor, block_ids: torch.Tensor) -> None:
        reference.scatter_blocks(staging, kv_cache, block_ids)

    def copy_blocks(self, kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        reference.copy_blocks(kv_cache, src_ids, dst_ids)
