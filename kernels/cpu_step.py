"""What the CPU back end derives from one step's `AttentionMeta`: plans, rotary factors, rows to write.

A layer asks for the same values as the layer before it; the first one to ask computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvbaton.kernels.cpu_plan import CpuPlan, PoolShape, plan_attention
from kvbaton.kernels.meta import AttentionMeta


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and signed sin of each token over both halves: x * cos + swap_halves(x) * sin is the rotation."""

    cos: torch.Tensor  # [num_tokens, 1, rotary_dim] float32
    sin: torch.Tensor  # [num_tokens, 1, rotary_dim] float32, the first half negated

    @classmethod
    def at(cls, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
        c, s = cos[positions].float(), sin[positions].float()
        return cls(torch.cat((c, c), -1).unsqueeze(1), torch.cat((-s, s), -1).unsqueeze(1))

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, heads, head_dim], rotated over its first rotary_dim dims, in float32."""
        width = self.cos.shape[-1]
        if width < x.shape[-1]:
            return torch.cat((self.turn(x[..., :width]), x[..., width:]), dim=-1)
        wide = x.float()
        return (wide * self.cos).addcmul_(wide.roll(width // 2, -1), self.sin).to(x.dtype)


class CpuStep:
    """The derived values of one `meta`; lives until the next step replaces it."""

    def __init__(self, meta: AttentionMeta) -> None:
        self.meta = meta
        self._plans: dict[tuple[PoolShape, int | None], CpuPlan] = {}
        self._slot_rows: dict[PoolShape, torch.Tensor] = {}
        self._rotary: tuple[torch.Tensor, Rotary] | None = None

    def plan(self, shape: PoolShape, sliding_window: int | None) -> CpuPlan:
        key = (shape, sliding_window)
        if key not in self._plans:
            self._plans[key] = plan_attention(self.meta, shape, sliding_window)
        return self._plans[key]

    def rotary(self, cos: torch.Tensor, sin: torch.Tensor) -> Rotary:
        """Factors of this step's positions; a layer with another table computes its own."""
        if self._rotary is None or self._rotary[0] is not cos:
            self._rotary = (cos, Rotary.at(self.meta.positions, cos, sin))
        return self._rotary[1]

    def slot_rows(self, shape: PoolShape) -> torch.Tensor:
        """[num_tokens * 2 * num_kv_heads]: layer 0's rows of head_dim to which each token's K and V heads go."""
        if shape not in self._slot_rows:
            slot, size = self.meta.slot_mapping, shape.block_size
            tiles = shape.tiles((slot // size).unsqueeze(1).numpy())  # [2, num_tokens, num_kv_heads, 1]
            rows = torch.from_numpy(tiles).squeeze(-1).transpose(0, 1) * size + (slot % size)[:, None, None]
            self._slot_rows[shape] = rows.flatten()
        return self._slot_rows[shape]
