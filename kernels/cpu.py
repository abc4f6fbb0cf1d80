"""The CPU back end: each operation in the form that measured fastest, with the reference's meaning.

* Attention is native where there is a compiler. Else it gathers whole [block_size, head_dim] tiles with one
  `index_select` for K and V and hands them to torch's fused attention. The query heads of one KV head become its query
  rows, so nothing is repeated for GQA.
* Prefill runs a sequence at a time in tiles of queries that see only the keys up to their own last position.
* Everything that depends on the step and not on the layer is computed once a step: see `cpu_plan`.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from kvbaton.kernels import reference
from kvbaton.kernels.cpu_plan import QUERY_TILE, CpuPlan, CpuStep, DecodeGroup, PoolShape, PrefillSpan
from kvbaton.kernels.host_memory import Workspace
from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.native_lib import DTYPE_CODES, HeadsStruct, Team, batch_struct, native_library

# With this many rows, MKL's float32 product differs in the last bit between torch's main and worker threads, so a
# result would depend on where its batch put it. With one row more it does not.
UNSTABLE_GROUPS = (1, 3)


class NativeAttention:
    """Paged attention by the native library, straight from the pool; one thread at a time."""

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


class CpuKernels:
    """`Kernels` on the CPU. Keeps what it derived from the last `AttentionMeta`; one instance serves one thread."""

    def __init__(self, attention: NativeAttention | None = None) -> None:
        """`attention` takes the place of the plain PyTorch form of `paged_attention` where it fits."""
        self._attention = attention
        self._last: CpuStep | None = None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def linear_int8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return reference.linear_int8(x, weight, scale, bias)

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
        step = self._step(meta)
        factors = step.rotary(cos, sin)
        fresh = torch.stack((factors.turn(k), v), dim=1)  # [num_tokens, 2, num_kv_heads, head_dim]
        shape = PoolShape.of(kv_cache)
        rows = shape.layer_tiles(kv_cache, layer).view(-1, shape.head_dim)
        rows.index_copy_(0, step.slot_rows(shape), fresh.view(-1, shape.head_dim))
        return factors.turn(q)

    def paged_attention(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        if self._attention is not None and self._attention.fits(q, kv_cache):
            return self._attention(q, kv_cache, layer, meta, scale, sliding_window)
        shape = PoolShape.of(kv_cache)
        plan = self._step(meta).plan(shape, sliding_window)
        tiles = shape.layer_tiles(kv_cache, layer)
        out = torch.empty(q.shape, dtype=q.dtype)
        for group in plan.decodes:
            out.index_copy_(0, group.rows, _decode(q, tiles, group, shape, scale))
        for span in plan.prefills:
            rows = slice(span.row, span.row + span.num_queries)
            _prefill(q[rows], tiles, span, plan, scale, out[rows])
        return out

    def copy_blocks(self, kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        reference.copy_blocks(kv_cache, src_ids, dst_ids)

    def _step(self, meta: AttentionMeta) -> CpuStep:
        if self._last is None or self._last.meta is not meta:
            self._last = CpuStep(meta)
        return self._last


def _decode(q: torch.Tensor, tiles: torch.Tensor, group: DecodeGroup, shape: PoolShape, scale: float) -> torch.Tensor:
    """q [num_tokens, num_heads, head_dim] -> [group rows, num_heads, head_dim]."""
    rows, heads, dim = len(group.rows), q.shape[1], q.shape[2]
    flat = tiles.index_select(0, group.tiles).view(-1, dim)
    flat.index_fill_(0, group.holes, 0)
    k, v = flat.view(2, rows, shape.num_kv_heads, -1, dim)
    packed = q.index_select(0, group.rows).view(rows, shape.num_kv_heads, -1, dim)
    size = packed.shape[2]
    if size in UNSTABLE_GROUPS:
        packed = torch.cat((packed, packed[:, :, :1]), dim=2)
    if rows * shape.num_kv_heads == 1:  # a lone product would be split over threads, and summed in another order
        packed, k, v = (x.expand(2, -1, -1, -1) for x in (packed, k, v))
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=group.bias, scale=scale)
    return out[:rows, :, :size].reshape(rows, heads, dim)


def _prefill(
    q: torch.Tensor, tiles: torch.Tensor, span: PrefillSpan, plan: CpuPlan, scale: float, out: torch.Tensor
) -> None:
    """One sequence's chunk: q and out [num_queries, num_heads, head_dim]."""
    k, v = tiles.index_select(0, span.tiles).view(2, 1, plan.shape.num_kv_heads, -1, q.shape[2])
    for start in range(0, span.num_queries, QUERY_TILE):
        stop = min(start + QUERY_TILE, span.num_queries)
        position = span.context_len - span.num_queries + start
        first, last = plan.first_seen(position) - span.first_key, position + stop - start - span.first_key
        part = F.scaled_dot_product_attention(
            q[start:stop].transpose(0, 1).unsqueeze(0),
            k[:, :, first:last],
            v[:, :, first:last],
            attn_mask=plan.causal_bias[start - stop :, first - last :],
            scale=scale,
            enable_gqa=True,
        )
        out[start:stop] = part[0].transpose(0, 1)
