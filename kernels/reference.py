"""Plain torch: what every back end must compute. Clarity comes before speed; any device, any float dtype.

Norms, SiLU and softmax are computed in float32; results are rounded to the input's dtype where Hugging Face's models
round them, so float32 agrees with transformers to the last bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.quantization import storage, to_kv

_OUTPUTS = 8192


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., hidden]; the mean of squares in float32, the product with `weight` in x's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of the sum, the sum), each [num_tokens, hidden]; the sum is rounded before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[num_tokens, 2 * intermediate] -> [num_tokens, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_int8(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, in], weight [out, in] int8, scale [out] float32, bias [out] -> [rows, out] in x's dtype.

    Sums in float32; `_OUTPUTS` rows of the weight are floats at a time.
    """
    wide = x.float()
    parts = [F.linear(wide, some.float()) for some in torch.split(weight, _OUTPUTS)]
    out = torch.cat(parts, dim=-1) * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split (NeoX) order over the first 2 * cos.shape[-1] dims of x [T, heads, head_dim].

    cos and sin [T, rotary_dim / 2] are those of x's positions; the product is taken in float32.
    """
    half = cos.shape[-1]
    c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def write_kv(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, layer: int, slot_mapping: torch.Tensor) -> None:
    """Write k and v [num_tokens, num_kv_heads, head_dim] to their slots of one layer."""
    block_size = kv_cache.shape[4]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    pool = storage(kv_cache)
    pool[block, layer, 0, :, offset] = storage(to_kv(k, kv_cache.dtype))
    pool[block, layer, 1, :, offset] = storage(to_kv(v, kv_cache.dtype))


def rope_and_write_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    meta: AttentionMeta,
) -> torch.Tensor:
    """Rotated q [num_tokens, num_heads, head_dim]; rotated k and v go to the pool."""
    c, s = cos[meta.positions], sin[meta.positions]
    write_kv(rotate(k, c, s), v, kv_cache, layer, meta.slot_mapping)
    return rotate(q, c, s)


def context_kv(
    kv_cache: torch.Tensor, layer: int, block_table: torch.Tensor, context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, in token order: each [num_kv_heads, context_len, head_dim]."""
    # [max_blocks, 2, num_kv_heads, block_size, head_dim]
    blocks = storage(kv_cache)[block_table.long(), layer].view(kv_cache.dtype)
    flat = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context_len]
    return flat[0], flat[1]


def visible(num_queries: int, context_len: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """[num_queries, context_len] bool: key j is seen from position i iff j <= i and, with a window w, j > i - w."""
    query = torch.arange(context_len - num_queries, context_len, device=device).unsqueeze(1)
    key = torch.arange(context_len, device=device).unsqueeze(0)
    seen = key <= query
    return seen if sliding_window is None else seen & (key > query - sliding_window)


def ragged_prefill_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """q [num_tokens, num_heads, head_dim] -> same shape. The chunk's own K and V are already in the pool.

    Sequence i has rows cu_seqlens_q[i] .. cu_seqlens_q[i + 1] of q, counted from cu_seqlens_q[0].
    """
    bounds, lens = (cu_seqlens_q - cu_seqlens_q[0]).tolist(), context_lens.tolist()
    out = torch.empty_like(q)
    for i, context_len in enumerate(lens):
        rows = slice(bounds[i], bounds[i + 1])
        k, v = context_kv(kv_cache, layer, block_tables[i], context_len)
        out[rows] = _attend(q[rows], k, v, scale, sliding_window)
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, sliding_window: int | None
) -> torch.Tensor:
    """One sequence: q [queries, num_heads, head_dim], k and v [num_kv_heads, context_len, head_dim]."""
    group = q.shape[1] // k.shape[0]
    k, v = k.repeat_interleave(group, 0).float(), v.repeat_interleave(group, 0).float()
    scores = torch.einsum("qhd,hkd->hqk", q.float(), k) * scale
    seen = visible(q.shape[0], k.shape[1], sliding_window, q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,hkd->qhd", weights, v).to(q.dtype)


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    meta: AttentionMeta,
    scale: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """The mixed batch of `meta`: q [num_tokens, num_heads, head_dim] -> same shape."""
    return ragged_prefill_attention(
        q, kv_cache, layer, meta.block_tables, meta.cu_seqlens_q, meta.context_lens, scale, sliding_window
    )


def copy_blocks(kv_cache: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
    """Block src_ids[i] to dst_ids[i]; no destination occurs twice or among the sources."""
    pool = storage(kv_cache)
    pool.index_copy_(0, dst_ids.long(), pool.index_select(0, src_ids))
