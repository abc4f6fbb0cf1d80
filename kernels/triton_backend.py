"""The CUDA back end: Triton kernels behind the `Kernels` seam. Importing this module imports triton."""

from __future__ import annotations

import torch

from kvbaton.kernels import (
    triton_copy,
    triton_decode,
    triton_linear,
    triton_pointwise,
    triton_prefill,
    triton_rope,
)
from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.torch_prefill import gathered_prefill_attention


class TritonKernels:
    """`Kernels` on CUDA. No launch waits for the device or reads from it."""

    def __init__(self, max_gathered_tokens: int = 0) -> None:
        """Prompt chunks attend by torch's flash attention, see `torch_prefill`, where the contexts of a step's chunks
        are no longer than `max_gathered_tokens` together."""
        self.max_gathered_tokens = max_gathered_tokens

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return triton_pointwise.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return triton_pointwise.add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return triton_pointwise.silu_mul(gate_up)

    def linear_int8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return triton_linear.linear_int8(x, weight, scale, bias)

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
        return triton_rope.rope_and_write_kv(q, k, v, cos, sin, kv_cache, layer, meta)

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Decode rows by the split kernel, the rest by the prefill kernel, both into one output."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        n, cache = meta.num_decodes, kv_cache[:, layer]
        tables, lens = meta.block_tables, meta.context_lens
        width = -(-max(meta.context_lens_host[:n], default=0) // meta.block_size)
        triton_decode.decode_into(out[:n], q[:n], cache, tables[:n, :width], lens[:n], scale, sliding_window)
        if 0 < sum(meta.context_lens_host[n:]) <= self.max_gathered_tokens:
            out[n:] = gathered_prefill_attention(q[n:], kv_cache, layer, meta, scale, sliding_window)
            return out
        triton_prefill.prefill_into(
            out[n:], q[n:], cache, tables[n:], meta.cu_seqlens_q[n:], lens[n:], scale, sliding_window
        )
        return out

    def copy_blocks(self, kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        triton_copy.copy_blocks(kv_cache, src_ids, dst_ids)
