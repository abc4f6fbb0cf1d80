"""The decoder on a CUDA device against itself on the CPU."""

from __future__ import annotations

import pytest
import torch

from kvbaton.engine.greedy import generate
from kvbaton.engine.model.loader import LoadedModel, load_model, random_model
from kvbaton.kernels.meta import build_attention_meta
from support.oracle import FAMILIES, TinyModels, oracle_logits, prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BLOCK_SIZE = 16


def _logits(model: LoadedModel, prompt: list[int]) -> torch.Tensor:
    config, device = model.config, model.decoder.device
    width = -(-len(prompt) // BLOCK_SIZE)
    shape = (width, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    cache = torch.zeros(shape, dtype=model.decoder.dtype, device=device)
    meta = build_attention_meta([len(prompt)], [len(prompt)], [range(width)], BLOCK_SIZE, device, 0)
    hidden = model.decoder.forward(torch.tensor(prompt, device=device), cache, meta)
    return model.decoder.logits(hidden).cpu()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_on_the_gpu_equal_transformers(tiny_model: TinyModels, family: str) -> None:
    """Guards the Triton kernels in their place: float32 within its rounding, bfloat16 within its own."""
    folder, prompt = tiny_model(family), prompts()[-1]
    wanted = oracle_logits(folder, prompt)
    full = load_model(folder, torch.device("cuda"), 1)
    torch.testing.assert_close(_logits(full, prompt), wanted, atol=0.01, rtol=0)
    half = load_model(folder, torch.device("cuda"), "bfloat16")
    assert (_logits(half, prompt) - wanted).norm() / wanted.norm() < 0.15


def test_grouped_experts_wait_for_nothing(tiny_model: TinyModels) -> None:
    """Guards CUDA graph capture of expert models, where the device has the grouped product."""
    model = load_model(tiny_model("mixtral"), torch.device("cuda"), "bfloat16")
    if not model.decoder.capturable:
        pytest.skip("this device has no grouped product")
    generate(model.decoder, [[1, 2, 3]], 2)  # compiles
    config = model.config
    cache = torch.zeros(1, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim).bfloat16().cuda()
    meta = build_attention_meta([1], [4], [[0]], BLOCK_SIZE, torch.device("cuda"), 1)
    token = torch.tensor([5], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        hidden = model.decoder.forward(token, cache, meta)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.isfinite().all()


def test_random_weights_are_made_on_the_device(tiny_model: TinyModels) -> None:
    config = load_model(tiny_model("llama"), torch.device("cpu")).config
    one, same = (random_model(config, 3, torch.device("cuda"), "bfloat16") for _ in range(2))
    assert one.decoder.weights.embed.is_cuda
    assert torch.equal(one.decoder.weights.lm_head, same.decoder.weights.lm_head)
