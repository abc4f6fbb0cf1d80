"""Mixture of experts: every token goes to its `top_k` experts, and each expert sees all of its tokens at once.

Tokens are sorted by expert, run as one matrix product per expert, put back in order and summed with their routing
weights. The sum runs over a token's own experts in rank order, so it does not depend on who else is in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kvbaton.engine.model.model_config import MoeConfig
from kvbaton.engine.model.weights import MoeWeights
from kvbaton.kernels.backend import Kernels


def route(hidden: torch.Tensor, router: torch.Tensor, moe: MoeConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [num_tokens, hidden] -> (weights [num_tokens, top_k] float32, expert ids [num_tokens, top_k])."""
    probabilities = F.linear(hidden, router).softmax(-1, dtype=torch.float32)
    weights, experts = probabilities.topk(moe.top_k, dim=-1)
    if moe.normalize_top_k:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def run_experts(hidden: torch.Tensor, layer: MoeWeights, moe: MoeConfig, kernels: Kernels) -> torch.Tensor:
    """hidden [num_tokens, hidden] -> same shape."""
    weights, experts = route(hidden, layer.router, moe)
    by_expert, order = experts.flatten().sort(stable=True)  # [num_tokens * top_k] pairs (token, rank)
    all_experts = torch.arange(moe.num_experts, device=hidden.device)
    ends = torch.searchsorted(by_expert, all_experts, right=True, out_int32=True)  # [num_experts]
    run = grouped_product if runs_without_host_sync(layer.gate_up) else product_per_expert
    out = run(hidden[order // moe.top_k], ends, layer, kernels)
    in_order = torch.empty_like(out).index_copy_(0, order, out).view(*experts.shape, -1)
    return (in_order * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def runs_without_host_sync(weight: torch.Tensor) -> bool:
    """True where the grouped product runs on the device alone, so that a step can be captured in a CUDA graph.

    weight [num_experts, out, in]; PyTorch's grouped product wants bfloat16, rows of 16 bytes and compute capability 9.
    """
    return (
        weight.is_cuda
        and weight.dtype is torch.bfloat16
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(weight.device) >= (9, 0)
    )


def product_per_expert(
    grouped: torch.Tensor, ends: torch.Tensor, layer: MoeWeights, kernels: Kernels
) -> torch.Tensor:  # [num_tokens * top_k, hidden]
    """Rows up to ends[e] belong to experts 0..e. Touches only the weights of experts that have rows."""
    out = torch.empty_like(grouped)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            inner = kernels.silu_mul(F.linear(grouped[start:end], layer.gate_up[expert]))
            torch.mm(inner, layer.down[expert].T, out=out[start:end])
            start = end
    return out


def grouped_product(
    grouped: torch.Tensor, ends: torch.Tensor, layer: MoeWeights, kernels: Kernels
) -> torch.Tensor:  # [num_tokens * top_k, hidden]
    """The same as two grouped products; the ends stay on the device."""
    gate_up = F.grouped_mm(grouped, layer.gate_up.transpose(1, 2), offs=ends)
    return F.grouped_mm(kernels.silu_mul(gate_up), layer.down.transpose(1, 2), offs=ends)
