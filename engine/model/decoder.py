"""The decoder: one forward pass over a ragged batch, for every family that `ModelConfig` can describe.

    token ids -> embedding -> layers of (norm, attention, norm, MLP or experts) -> norm -> hidden
    hidden rows that need them -> logits

The residual stream is added inside the norm that follows (`add_rms_norm`), so it is read and written once per
half layer. Attention reads K and V from the paged pool only: a chunk's own are written there first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.moe import run_experts, runs_without_host_sync
from kvbaton.engine.model.rotary import RotaryTables
from kvbaton.engine.model.weights import AttentionWeights, DecoderWeights, Int8Matrix, Matrix, MlpWeights, MoeWeights
from kvbaton.kernels.backend import Kernels
from kvbaton.kernels.meta import AttentionMeta


class Decoder:
    """Weights and the pass through them; keeps no state between calls."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, kernels: Kernels, max_positions: int | None = None
    ) -> None:
        """`max_positions` bounds the rotary tables; None takes all that the model was trained for."""
        self.config = config
        self.weights = weights
        self._kernels = kernels
        positions = max_positions or config.max_position_embeddings
        self.rotary = RotaryTables.of(config.rope, config.head_dim, positions, self.device)
        self._scale = config.head_dim**-0.5
        # the norm after layer i is layer i + 1's first, or the last one
        self._norm_after = (*(layer.input_norm for layer in weights.layers[1:]), weights.norm)

    @property
    def device(self) -> torch.device:
        return self.weights.embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.embed.dtype

    @property
    def max_positions(self) -> int:
        return self.rotary.cos.shape[0]

    @property
    def capturable(self) -> bool:
        """Whether `forward` never waits for the device, as CUDA graphs demand."""
        return all(
            isinstance(layer.mlp, MlpWeights)
            or (runs_without_host_sync(layer.mlp.gate_up) and runs_without_host_sync(layer.mlp.down))
            for layer in self.weights.layers
        )

    def with_kernels(self, kernels: Kernels) -> Decoder:
        """The same weights on other kernels."""
        return Decoder(self.config, self.weights, kernels, self.max_positions)

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor, kv_cache: torch.Tensor, meta: AttentionMeta) -> torch.Tensor:
        """token_ids [num_tokens] -> normed hidden states [num_tokens, hidden].

        Writes the tokens' K and V to the slots of `meta` in
        kv_cache [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        eps = self.config.rms_norm_eps
        residual = F.embedding(token_ids, self.weights.embed)
        normed = self._kernels.rms_norm(residual, self.weights.layers[0].input_norm, eps)
        for index, layer in enumerate(self.weights.layers):
            out = self._attention(index, layer.attention, normed, kv_cache, meta)
            normed, residual = self._kernels.add_rms_norm(out, residual, layer.post_norm, eps)
            out = self._mlp(layer.mlp, normed)
            normed, residual = self._kernels.add_rms_norm(out, residual, self._norm_after[index], eps)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden] of `forward` -> float32 [rows, vocab]."""
        return self._linear(hidden, self.weights.lm_head, None).float()

    def _linear(self, x: torch.Tensor, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
        """x [rows, in], matrix [out, in] -> [rows, out]."""
        if isinstance(matrix, Int8Matrix):
            return self._kernels.linear_int8(x, matrix.weight, matrix.scale, bias)
        return F.linear(x, matrix, bias)

    def _attention(
        self, index: int, layer: AttentionWeights, x: torch.Tensor, kv_cache: torch.Tensor, meta: AttentionMeta
    ) -> torch.Tensor:
        """x [num_tokens, hidden] -> same shape."""
        config = self.config
        qkv = self._linear(x, layer.qkv, layer.qkv_bias)
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=-1)
        q = q.view(-1, config.num_heads, config.head_dim)
        k = k.view(-1, config.num_kv_heads, config.head_dim)
        v = v.view(-1, config.num_kv_heads, config.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._kernels.rms_norm(q, layer.q_norm, config.rms_norm_eps)
            k = self._kernels.rms_norm(k, layer.k_norm, config.rms_norm_eps)
        q = self._kernels.rope_and_write_kv(q, k, v, self.rotary.cos, self.rotary.sin, kv_cache, index, meta)
        out = self._kernels.paged_attention(q, kv_cache, index, meta, self._scale, config.sliding_windows[index])
        return self._linear(out.flatten(1), layer.out, layer.out_bias)

    def _mlp(self, layer: MlpWeights | MoeWeights, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, hidden] -> same shape."""
        if isinstance(layer, MoeWeights):
            if self.config.moe is None:
                raise ValueError("expert weights in a model whose config has no experts")
            return run_experts(x, layer, self.config.moe, self._kernels)
        inner = self._kernels.silu_mul(self._linear(x, layer.gate_up, layer.gate_up_bias))
        return self._linear(inner, layer.down, layer.down_bias)
