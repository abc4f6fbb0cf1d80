"""Options that the tiny checkpoints do not use, on models that transformers itself made and saved."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvbaton.engine.model.checkpoint import Checkpoint
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import load_model
from kvbaton.engine.model.native_decoder import NativeDecoder, native_decoder
from kvbaton.kernels.meta import build_attention_meta
from support.oracle import reference_model

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # logits have a standard deviation of about 1.5


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
PHI_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.4, 1.9, 2.0],
            "long_factor": [1.0, 1.5, 3.0, 6.0, 12.0, 30.0], "partial_rotary_factor": 0.75}  # fmt: skip
VARIANTS = (
    Variant("linear rope, every bias", "Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    Variant("tied, wide heads", "Llama", {"tie_word_embeddings": True, "head_dim": 32, "num_key_value_heads": 1}),
    Variant("windows from layer 1", "Qwen2", {"use_sliding_window": True, "sliding_window": 20,
            "max_window_layers": 1}),
    Variant("windows by layer type", "Qwen3", {"use_sliding_window": True, "sliding_window": 20, "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    Variant("attention bias", "Qwen3", {"attention_bias": True, "head_dim": 32}),
    Variant("no window", "Mistral", {"sliding_window": None}),
    Variant("window and experts", "Mixtral", {"sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Variant("raw routing weights", "Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
            "moe_intermediate_size": 32, "decoder_sparse_step": 2, "head_dim": 16}),
    Variant("window on all layers", "Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True,
            "moe_intermediate_size": 32, "use_sliding_window": True, "sliding_window": 20}),
    Variant("yarn", "Qwen2", {"rope_parameters": YARN}),
    Variant("yarn with its own scale", "Llama", {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False,
            "beta_fast": 16.0, "beta_slow": 2.0}}),
    Variant("yarn as DeepSeek writes it", "Qwen3", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
            "head_dim": 16}),
    Variant("dynamic rope", "Mistral", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    Variant("longrope", "Llama", {"rope_parameters": PHI_LONG | {"partial_rotary_factor": 1.0, "factor": 4.0,
            "short_factor": [1.0] * 8, "long_factor": [1.0, 1.2, 1.5, 2.0, 4.0, 8.0, 8.0, 9.0],
            "original_max_position_embeddings": 64}}),
    Variant("plain", "Phi3", {"pad_token_id": 0, "eos_token_id": 0}),
    Variant("half of each head turns", "Phi3", {"pad_token_id": 0, "eos_token_id": 0, "sliding_window": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    Variant("longrope, partial", "Phi3", {"pad_token_id": 0, "eos_token_id": 0, "rope_parameters": PHI_LONG,
            "original_max_position_embeddings": 64}),
)  # fmt: skip
LONGROPES = tuple(variant for variant in VARIANTS if "longrope" in variant.name)
COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def _save(variant: Variant, folder: Path) -> Path:
    """A model of transformers with weights large enough to matter, saved by it."""
    config = getattr(transformers, f"{variant.family}Config")(**(COMMON | variant.options))
    model = getattr(transformers, f"{variant.family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 1.5 / parameter.shape[-1] ** 0.5, generator=generator)
        else:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    return folder


def _plain(decoder: Decoder) -> Decoder:
    return decoder


def _logits(decoder: Decoder | NativeDecoder, tokens: list[int]) -> torch.Tensor:
    config = decoder.config
    cache = torch.zeros(8, config.num_layers, 2, config.num_kv_heads, 16, config.head_dim)
    meta = build_attention_meta([len(tokens)], [len(tokens)], [range(8)], 16, CPU, 0)
    return decoder.logits(decoder.forward(torch.tensor(tokens), cache, meta))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.family}: {variant.name}")
def test_what_transformers_saves_computes_the_same_here(variant: Variant, tmp_path: Path) -> None:
    """Guards each flag of ModelConfig, and reading what the installed transformers writes."""
    folder = _save(variant, tmp_path)
    tokens = torch.randint(256, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = reference_model(folder)(torch.tensor([tokens])).logits[0]
    for form in (_plain, native_decoder):
        decoder = form(load_model(folder, CPU).decoder)
        torch.testing.assert_close(_logits(decoder, tokens), wanted, atol=TOLERANCE, rtol=0)


def test_yarn_added_by_hand_serves_the_length_that_it_is_for(tmp_path: Path) -> None:
    """Guards Qwen's own advice: the config keeps `max_position_embeddings`, and transformers goes on past it."""
    folder = _save(Variant("", "Qwen2", {"max_position_embeddings": 64}), tmp_path)
    values = json.loads((folder / "config.json").read_text())
    values["rope_scaling"] = YARN | {"factor": 2.0, "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(values))
    tokens = torch.randint(256, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = reference_model(folder)(torch.tensor([tokens])).logits[0]
    loaded = load_model(folder, CPU)
    assert loaded.config.max_position_embeddings == loaded.decoder.max_positions == 128
    torch.testing.assert_close(_logits(loaded.decoder, tokens), wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", LONGROPES, ids=lambda variant: variant.family)
def test_an_engine_of_short_contexts_takes_the_short_factors(variant: Variant, tmp_path: Path) -> None:
    """transformers chooses by each sequence; kept keys can't be turned again, so an engine chooses once."""
    folder = _save(variant, tmp_path)
    tokens = torch.randint(256, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        wanted = reference_model(folder)(torch.tensor([tokens])).logits[0]
    short, long = load_model(folder, CPU, max_positions=64), load_model(folder, CPU, max_positions=65)
    torch.testing.assert_close(_logits(short.decoder, tokens), wanted, atol=TOLERANCE, rtol=0)
    assert (_logits(long.decoder, tokens) - wanted).abs().max() > 0.01
    assert short.fingerprint != long.fingerprint  # neither may read the other's keys


@pytest.mark.parametrize("variant", VARIANTS[6:8], ids=lambda variant: variant.family)
def test_stacked_experts_load_like_single_ones(variant: Variant, tmp_path: Path) -> None:
    """Guards checkpoints that hold a layer's experts in one tensor, as transformers keeps them in memory."""
    folder = _save(variant, tmp_path)
    tokens = list(range(40))
    wanted = _logits(load_model(folder, CPU).decoder, tokens)
    stacked = dict(reference_model(folder).state_dict())
    plain = load_file(folder / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    assert not any(name.endswith("experts.gate_up_proj") for name in plain)
    save_file({name: value.contiguous() for name, value in stacked.items()}, folder / "model.safetensors")
    assert torch.equal(_logits(load_model(folder, CPU).decoder, tokens), wanted)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6], VARIANTS[9], VARIANTS[12], *LONGROPES])
def test_old_style_config_reads_the_same(variant: Variant, tmp_path: Path) -> None:
    """Guards hub checkpoints from before transformers 5: rope_theta, rope_scaling, torch_dtype."""
    folder = _save(variant, tmp_path)
    new = load_model_config(folder)
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = rope | {"type": kind} if kind != "default" else None
    values["torch_dtype"] = values.pop("dtype")
    (folder / "config.json").write_text(json.dumps(values))
    assert load_model_config(folder) == new


def test_shards_load_like_one_file(tmp_path: Path) -> None:
    """Guards the index: every shard read, and the digest of the bytes independent of the split."""
    folder = _save(VARIANTS[4], tmp_path)
    tokens = list(range(40))
    wanted = _logits(load_model(folder, CPU).decoder, tokens)
    single = load_model(folder, CPU).fingerprint
    reference_model(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = list((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    sharded = load_model(tmp_path / "sharded", CPU)
    assert torch.equal(_logits(sharded.decoder, tokens), wanted)
    assert sharded.fingerprint == single
    assert len(Checkpoint.open(tmp_path / "sharded").tensors) == len(Checkpoint.open(folder).tensors)
