"""8-bit weights in the engine: what is quantized and what is not, what they weigh, and how far from the plain ones."""

from __future__ import annotations

import gc
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from kvbaton.cluster.config.cluster_config import ClusterConfig, HostingConfig
from kvbaton.cluster.launch.preflight import check_launch
from kvbaton.engine.config import CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import load_model, random_model
from kvbaton.engine.model.weights import Int8Matrix, empty_weights, slots
from kvbaton.kernels import quantization as eight_bits
from kvbaton.settings import ConfigError
from support.engine_driver import EngineDriver
from support.oracle import TinyModels, oracle_logits, prompts

CPU = torch.device("cpu")
# |error| / |value| of a prompt's log-probabilities, teacher-forced, against transformers on plain weights in float32.
# The tiny models are sharpened on purpose; 0.011 to 0.023 was seen over four families and four prompts.
LOGPROB_TOLERANCE = 0.04
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def by_hand(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers, scale) of one whole tensor, in float64 where the definition allows."""
    scale = (weight.float().abs().amax(1).double() / 127).float()
    return torch.round((weight.float() / scale.unsqueeze(1)).double()).to(torch.int8), scale


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_matrix_is_integers_and_nothing_else(tiny_model: TinyModels, family: str, dtype: str) -> None:
    """Guards which tensors are quantized, from what (the file's values, not those rounded to the dtype), and into which
    part of a fused matrix; a tied projection has integers of the embedding, which itself stays."""
    folder = tiny_model(family)
    stored = load_file(folder / "model.safetensors")
    model = load_model(folder, CPU, dtype, quantization="int8")
    weights = model.decoder.weights
    for slot in slots(model.config, weights):
        matrix = any(f"{name}.weight" in slot.name for name in MATRICES)
        assert isinstance(slot.target, Int8Matrix) is matrix, slot.name
        if isinstance(slot.target, Int8Matrix):
            want, scale = by_hand(stored[slot.name])
            assert torch.equal(slot.target.weight, want), slot.name
            assert torch.equal(slot.target.scale, scale), slot.name
        else:
            assert torch.equal(slot.target, stored[slot.name].to(getattr(torch, dtype))), slot.name
    assert isinstance(weights.lm_head, Int8Matrix)
    if model.config.tie_word_embeddings:
        assert torch.equal(weights.lm_head.weight, by_hand(weights.embed)[0])


def test_the_model_weighs_what_it_should(tiny_model: TinyModels) -> None:
    """Guards memory: integers and scales, and no matrix in the model's dtype beside them but the embedding."""
    config = load_model(tiny_model("qwen2"), CPU).config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.q_size + 2 * config.kv_size
    elements = config.num_layers * hidden * (heads + config.q_size + 3 * inner) + config.vocab_size * hidden
    outputs = config.num_layers * (heads + 2 * hidden + 2 * inner) + config.vocab_size
    others = config.vocab_size * hidden + (2 * config.num_layers + 1) * hidden + config.num_layers * heads
    weights = random_model(config, 1, CPU, "bfloat16", 64, "int8").decoder.weights
    assert num_bytes(weights) == elements + 4 * outputs + 2 * others


def num_bytes(part: object) -> int:
    """Of all tensors in a tree of dataclasses and tuples; tied ones do not occur here."""
    if isinstance(part, torch.Tensor):
        return part.untyped_storage().nbytes()
    if isinstance(part, tuple):
        return sum(map(num_bytes, part))
    return sum(num_bytes(getattr(part, field.name)) for field in fields(part)) if is_dataclass(part) else 0


class LargestFloats(TorchDispatchMode):
    """Bytes of the largest memory that a floating-point result lay in."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


def test_loading_never_holds_a_matrix_in_floats(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the memory that loading takes: only a few rows exist as floats beside what the file maps, which here are
    matrices that repeat one value and so have no memory of their own."""
    config = load_model_config(tiny_model("llama"))
    monkeypatch.setattr(eight_bits, "_CHUNK_ELEMENTS", 1024)
    weights = empty_weights(config, torch.bfloat16, CPU, "int8")
    with LargestFloats() as seen:
        for slot in slots(config, weights):
            if isinstance(slot.target, Int8Matrix):
                slot.target.copy_(torch.ones(1).expand(slot.target.shape))
    assert seen.num_bytes == 1024 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_pool_grows_by_what_the_weights_shrink(tiny_model: TinyModels) -> None:
    """Guards the measured pool: it is sized from the memory that is free once the weights are there."""
    small = load_model_config(tiny_model("llama"))
    config = replace(small, hidden_size=4096, intermediate_size=16384, vocab_size=1024)  # 0.9 GB of bfloat16
    cuda, blocks = torch.device("cuda"), {}
    for quantization in ("none", "int8"):
        model = random_model(config, 1, cuda, "bfloat16", 64, quantization)
        engine = Engine(EngineConfig(Path("none"), "cuda", max_model_len=64, cuda_graphs=False), model, cuda)
        blocks[quantization] = engine.cache.num_blocks
        block_bytes, saved = engine.geometry.block_bytes, num_bytes(model.decoder.weights)
        del model, engine
        gc.collect()
    assert (blocks["int8"] - blocks["none"]) * block_bytes > 0.8 * 0.9 * saved


def test_a_tensor_that_is_not_finite_is_named(tiny_model: TinyModels, tmp_path: Path) -> None:
    folder = copied(tiny_model("llama"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder, CPU)
    with pytest.raises(ConfigError, match=r"layers\.2\.mlp\.up_proj\.weight cannot be quantized: .* not finite"):
        load_model(folder, CPU, quantization="int8")


def test_experts_are_refused_before_anything_starts(tiny_model: TinyModels) -> None:
    folder = tiny_model("mixtral")
    message = "quantization int8 is for models without experts; this one is a MixtralForCausalLM"
    with pytest.raises(ConfigError, match=message):
        load_model(folder, CPU, quantization="int8")
    settings = ClusterConfig(hosting=HostingConfig("cpu"), engine=EngineConfig(folder, quantization="int8"))
    with pytest.raises(ConfigError, match=message):
        check_launch(settings)


def test_the_setting_reaches_the_engine() -> None:
    settings = ClusterConfig(engine=EngineConfig(quantization="int8"))
    assert settings.engine_config("cpu", 1).quantization == "int8"
    assert ClusterConfig().engine_config("cpu", 1).quantization == "none"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_prompt_logprobs_stay_close_to_the_plain_model(tiny_model: TinyModels, family: str) -> None:
    """Teacher-forced. Guards the whole path: one scale at the wrong output is off by far more than rounding."""
    folder: Path = tiny_model(family)
    config = EngineConfig(folder, cache=CacheConfig(kv_memory_bytes=4 << 20), quantization="int8")
    for prompt in prompts()[3:]:
        driver = EngineDriver(Engine.load(config))
        seq = driver.add(prompt, prompt_logprobs=0)
        got = [one for at in (40, len(prompt) - 40) for one in driver.step((seq, at)).prompt_logprobs[0] or ()]
        driver.finish()
        want = oracle_logits(folder, prompt).log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        error = torch.tensor([one.logprob for one in got if one is not None]) - want
        assert len(error) == len(prompt) - 1
        assert 1e-4 < float(error.norm() / want.norm()) < LOGPROB_TOLERANCE


def copied(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to
