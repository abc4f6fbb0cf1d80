"""Routing and the two ways of running experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kvbaton.engine.model.model_config import MoeConfig
from kvbaton.engine.model.moe import grouped_product, product_per_expert, route, run_experts
from kvbaton.engine.model.weights import MoeWeights
from kvbaton.kernels.cpu import CpuKernels

HIDDEN, INNER, EXPERTS = 32, 16, 6
MOE = MoeConfig(EXPERTS, 2, INNER, True, frozenset({0}))


def _layer(dtype: torch.dtype = torch.float32) -> MoeWeights:
    generator = torch.Generator().manual_seed(0)
    return MoeWeights(
        router=(torch.randn(EXPERTS, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
        gate_up=(torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype),
        down=(torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / INNER**0.5).to(dtype),
    )


def _hidden(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def _one_token(x: torch.Tensor, layer: MoeWeights, moe: MoeConfig) -> torch.Tensor:
    """The definition, token by token and expert by expert."""
    probabilities = (layer.router @ x).softmax(0)
    best = probabilities.argsort(descending=True)[: moe.top_k].tolist()
    total = sum(float(probabilities[e]) for e in best) if moe.normalize_top_k else 1.0
    out = torch.zeros_like(x)
    for e in best:
        gate, up = (layer.gate_up[e] @ x).chunk(2)
        out += float(probabilities[e]) / total * (layer.down[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize(
    "moe", [MOE, replace(MOE, normalize_top_k=False), replace(MOE, top_k=1), replace(MOE, top_k=6)]
)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_equal_the_definition(moe: MoeConfig, tokens: int) -> None:
    """Guards the sort by expert and the way back."""
    layer, x = _layer(), _hidden(tokens)
    wanted = torch.stack([_one_token(row, layer, moe) for row in x])
    torch.testing.assert_close(run_experts(x, layer, moe, CpuKernels()), wanted, atol=1e-5, rtol=1e-5)


def test_experts_without_tokens_are_not_read() -> None:
    """Guards the speed of small batches: of a large layer only the chosen experts' weights may be touched."""
    layer, x = _layer(), _hidden(1)
    _, chosen = route(x, layer.router, MOE)
    others = [e for e in range(EXPERTS) if e not in chosen[0].tolist()]
    wanted = run_experts(x, layer, MOE, CpuKernels())
    layer.gate_up[others] = float("nan")
    layer.down[others] = float("nan")
    assert torch.equal(run_experts(x, layer, MOE, CpuKernels()), wanted)


@pytest.mark.parametrize("sizes", [(3, 0, 5, 1, 0, 7), (0, 0, 0, 0, 0, 4), (4, 0, 0, 0, 0, 0)])
def test_grouped_product_equals_one_product_an_expert(sizes: tuple[int, ...]) -> None:
    """Guards the path of large GPUs, experts without tokens at either end included."""
    layer, x = _layer(torch.bfloat16), _hidden(sum(sizes), torch.bfloat16)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    wanted = product_per_expert(x, ends, layer, CpuKernels())
    torch.testing.assert_close(grouped_product(x, ends, layer, CpuKernels()), wanted, atol=0.05, rtol=0.02)


def test_routing_weights_are_float32_and_normalised_only_when_asked() -> None:
    x = _hidden(5, torch.bfloat16)
    layer = _layer(torch.bfloat16)
    weights, _ = route(x, layer.router, MOE)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    raw, _ = route(x, layer.router, replace(MOE, normalize_top_k=False))
    assert (raw.sum(-1) < 0.999).all()
