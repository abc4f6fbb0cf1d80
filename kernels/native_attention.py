"""Paged attention by the native library, as one operation outside a fused pass."""

from __future__ import annotations

import ctypes

import torch

from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.native_lib import DTYPE_CODES, HeadsStruct, Team, Workspace, batch_struct, native_library


class NativeAttention:
    """Decode rows and chunks straight from the pool; one thread at a time."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._team = Team(library)
        self._workspace = Workspace()

    @staticmethod
    def fits(q: torch.Tensor, kv_cache: torch.Tensor) -> bool:
        """Same known dtype, pool in its own layout, and an even head size, for bfloat16 comes in pairs."""
        known = q.dtype is kv_cache.dtype and q.dtype in DTYPE_CODES
        return known and kv_cache.is_contiguous() and q.shape[-1] % 2 == 0

    def __call__(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """As `Kernels.paged_attention`: q [num_tokens, num_heads, head_dim] -> same shape."""
        q = q.contiguous()
        out = torch.empty_like(q)
        code, kv_heads = DTYPE_CODES[q.dtype], kv_cache.shape[3]
        heads = HeadsStruct(code, q.shape[1], kv_heads, q.shape[2], 0, layer, sliding_window or 0, scale)
        batch = batch_struct(meta, kv_cache)
        heads_at, batch_at = ctypes.addressof(heads), ctypes.addressof(batch)
        team = self._team.handle()
        work = self._workspace.pointer(self._library.kvb_attention_bytes(heads_at, batch_at, self._team.size))
        self._library.kvb_attention(team, heads_at, batch_at, q.data_ptr(), out.data_ptr(), work)
        return out


def native_attention() -> NativeAttention | None:
    """None where there is no native library."""
    library = native_library()
    return None if library is None else NativeAttention(library)
