"""Rotary frequencies and their scale, for every type, against the functions of transformers; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvbaton.engine.model.hf_rope import read_rope
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.model_config import Architecture, RopeConfig, RopeType
from kvbaton.engine.model.rotary import RotaryTables, inverse_frequencies
from kvbaton.settings import ConfigError

CPU = torch.device("cpu")
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}
SHORT_FACTORS, LONG_FACTORS = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
LONG = {"rope_type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 5e5},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}, "rope_theta": 5e5},
    "llama3, length beside it": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 256},
    "llama3, no length": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "yarn, theta inside": {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_theta": 5.0},
    "yarn, length beside it": {"rope_scaling": YARN, "original_max_position_embeddings": 1024},
    "yarn, no length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, no factor": {"rope_scaling": YARN | {"factor": None}},
    "yarn, no truncation": {"rope_scaling": YARN | {"truncate": False}},
    "yarn, betas": {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2}},
    "yarn, mscale": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
    "yarn, one mscale": {"rope_scaling": YARN | {"mscale": 0.707}},
    "yarn, attention": {"rope_scaling": YARN | {"attention_factor": 0.5}},
    "yarn, short": {"rope_scaling": YARN | {"original_max_position_embeddings": 8}},
    "longrope": {"rope_scaling": LONG, "original_max_position_embeddings": 512},
    "longrope, factor": {"rope_scaling": LONG | {"factor": 16.0, "original_max_position_embeddings": 512}},
    "longrope, attention": {"rope_scaling": LONG | {"attention_factor": 1.7, "original_max_position_embeddings": 512}},
    "longrope, no length": {"rope_scaling": LONG},
    "both: rope_scaling wins": {"rope_scaling": YARN | {"rope_theta": 1e6}, "rope_parameters": {"rope_theta": 1e6}},
    "both, theta beside them": {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    "an empty rope_scaling": {"rope_scaling": {}, "rope_parameters": YARN | {"rope_theta": 5e5}},
}


def read(values: dict[str, Any], arch: Architecture = Architecture.LLAMA) -> RopeConfig:
    return read_rope(JsonFields.parse("config.json", json.dumps(values).encode()), arch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [512, 4096])
def test_frequencies_and_scale_are_those_of_transformers(name: str, length: int) -> None:
    values = json.loads(json.dumps(SIZES | CASES[name]))
    rope = read(values)
    config = transformers.LlamaConfig(**values)
    assert config.rope_parameters["rope_type"] == rope.kind
    wanted, scale = ROPE_INIT_FUNCTIONS[rope.kind](config, CPU, seq_len=length)
    torch.testing.assert_close(inverse_frequencies(rope.at_length(length), 16), wanted, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(scale, rel=1e-12)


def test_cos_and_sin_are_scaled_and_long() -> None:
    rope = read(SIZES | {"rope_scaling": YARN})
    tables = RotaryTables.of(rope, 16, 4096, CPU)
    angles = torch.arange(4096).float().unsqueeze(1) * inverse_frequencies(rope, 16)
    assert torch.equal(tables.cos, angles.cos() * rope.attention_factor)
    assert torch.equal(tables.sin, angles.sin() * rope.attention_factor)
    assert rope.attention_factor > 1.2


PARTIAL: dict[RopeType, dict[str, Any]] = {
    RopeType.LINEAR: {"factor": 2.0},
    RopeType.DYNAMIC: {"factor": 2.0},
    RopeType.LLAMA3: LLAMA3,
    RopeType.YARN: YARN,
    RopeType.LONGROPE: LONG | {"short_factor": [1.5] * 4, "long_factor": [3.0] * 4},
}


@pytest.mark.parametrize("kind", PARTIAL)
def test_a_part_of_each_head_turns_at_the_frequencies_of_its_size(kind: RopeType) -> None:
    scaling = PARTIAL[kind] | {"rope_type": str(kind), "rope_theta": 1e4}
    partial = SIZES | {"rope_parameters": scaling | {"partial_rotary_factor": 0.5}}
    wanted, _ = ROPE_INIT_FUNCTIONS[kind](transformers.LlamaConfig(**json.loads(json.dumps(partial))), CPU)
    rope = replace(read(SIZES | {"rope_parameters": scaling}), rotary_factor=0.5)
    assert rope.rotary_dim(16) == 8
    torch.testing.assert_close(inverse_frequencies(rope, 16), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta 1e\\+06 would be lost for 10000"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope type 'proportional' is not supported; supported: def"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor 0 must be above 0"),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 1},
            "embeddings must be at least 2, got 1",
        ),
        ({"rope_scaling": YARN | {"beta_slow": -1}}, "beta_fast and beta_slow above 0"),
        ({"rope_scaling": LONG | {"short_factor": [0.0] * 8}}, "must be numbers above 0"),
        ({"rope_scaling": LONG | {"short_factor": "many"}}, "short_factor must be a list of numbers, got 'many'"),
        ({"rope_scaling": {"full_attention": {"rope_type": "yarn"}}}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported for a Llama"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor other than 1 is not supported"),
    ],
)
def test_what_would_be_lost_or_guessed_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(SIZES | values)
