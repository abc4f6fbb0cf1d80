"""Every field of the families' configs in the installed transformers: used, or without effect on what is computed.

A field that a new release of transformers adds fails here until somebody has decided which of the two it is.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbaton.engine.model.hf_config import parse_model_config
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.settings import ConfigError
from support.oracle import reference_model

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Mixtral", "Qwen3Moe", "Phi3")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
SLIDING = "sliding_attention"
# a value that must change what is computed, or be refused
USED: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "attention_bias": True,
    "decoder_sparse_step": 2,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "head_dim": 32,
    "hidden_act": "gelu",
    "hidden_size": 128,
    "intermediate_size": 128,
    "layer_types": [SLIDING, SLIDING, "full_attention"],
    "max_position_embeddings": 2048,
    "max_window_layers": 2,
    "mlp_bias": True,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 6,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "rope_parameters": YARN,
    "sliding_window": 30,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 300,
}
# a value other than the default, which transformers computes the same with
IRRELEVANT: dict[str, Any] = {
    "attention_dropout": 0.5,  # in training, as all of these
    "bos_token_id": 3,  # the tokenizer's own is used
    "chunk_size_feed_forward": 8,
    "embd_pdrop": 0.5,
    "id2label": {"0": "a", "1": "b"},
    "initializer_range": 0.5,
    "is_encoder_decoder": True,
    "label2id": {"a": 0, "b": 1},
    "output_hidden_states": True,
    "output_router_logits": True,
    "pad_token_id": 3,
    "pretraining_tp": 2,
    "problem_type": "regression",
    "resid_pdrop": 0.5,
    "return_dict": True,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "transformers_version": "4.30.0",
    "use_cache": False,
}
COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": 5,
    "pad_token_id": None,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
BASE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": WINDOWS,
    "Qwen3": WINDOWS | {"head_dim": 16},
    "Mistral": {"sliding_window": 20},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_sliding_window": True,
                 "sliding_window": 20, "norm_topk_prob": False},
    "Phi3": {"sliding_window": 20, "rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
}  # fmt: skip


def names(family: str) -> set[str]:
    """Every field of the family's config class."""
    return {field.name for field in fields(getattr(transformers, f"{family}Config"))}


def read(family: str, **changes: Any) -> ModelConfig:
    values = COMMON | BASE[family] | {"architectures": [f"{family}ForCausalLM"]} | changes
    return parse_model_config(JsonFields.parse("config.json", json.dumps(values).encode()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_is_known(family: str) -> None:
    assert names(family) <= USED.keys() | IRRELEVANT.keys()


def test_no_field_is_listed_that_is_gone() -> None:
    assert USED.keys() | IRRELEVANT.keys() == set().union(*map(names, FAMILIES))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_used_field_changes_the_model_or_is_refused(family: str) -> None:
    base, silent = read(family), []
    for name in sorted(names(family) & USED.keys()):
        try:
            changed = read(family, **{name: USED[name]})
        except ConfigError:
            continue
        if changed == base:
            silent.append(name)
    assert silent == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_irrelevant_field_is_that_in_transformers_too(family: str, tmp_path: Path) -> None:
    changes = {name: value for name, value in IRRELEVANT.items() if name in names(family)}
    assert read(family, **changes) == read(family)
    config = getattr(transformers, f"{family}Config")(**json.loads(json.dumps(COMMON | BASE[family])))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    tokens = torch.randint(256, (1, 50), generator=torch.Generator().manual_seed(1))
    logits = []
    for folder, edit in ((tmp_path / "plain", {}), (tmp_path / "edited", changes)):
        model.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
        with torch.inference_mode():
            logits.append(reference_model(folder)(tokens).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_differ_one_by_one_are_refused(family: str) -> None:
    """transformers 5 gives single layers other sizes by a field that no class declares."""
    with pytest.raises(ConfigError, match="per_layer_config is not supported"):
        read(family, per_layer_config={"1": {"num_key_value_heads": 1}})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_type_of_another_family_is_refused(family: str) -> None:
    """transformers goes by `model_type`, and would compute another model than `architectures` names."""
    own = getattr(transformers, f"{family}Config").model_type
    assert read(family, model_type=own) == read(family)
    with pytest.raises(ConfigError, match=f"model_type 'gemma' contradicts architectures, which needs '{own}'"):
        read(family, model_type="gemma")
