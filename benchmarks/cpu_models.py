"""The two models of the CPU benchmarks: sizes, and random checkpoints of them on disk that every engine can load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import save_weights
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.random_weights import random_weights

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Shape:
    """A model by its published sizes."""

    name: str
    architecture: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    def config_json(self, dtype: str) -> dict[str, Any]:
        """The parsed form of config.json, in the style that older and newer readers share."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-100m", "LlamaForCausalLM", "llama", 12, 768, 2048, 12, 12, 64, 32000, tied=False),
        Shape("qwen3-0.6b", "Qwen3ForCausalLM", "qwen3", 28, 1024, 3072, 16, 8, 128, 151936, tied=True),
    )
}


def checkpoint(name: str, dtype: str) -> Path:
    """The folder of a random checkpoint, written on first use."""
    folder = CACHE / f"{name}-{dtype}"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SHAPES[name].config_json(dtype), indent=2))
        config = load_model_config(folder)
        torch_dtype = getattr(torch, dtype)
        save_weights(folder, config, random_weights(config, 0, torch_dtype, torch.device("cpu")), torch_dtype)
    return folder


def matrix_elements(config: ModelConfig) -> int:
    """Weights that a decode step reads: all matrices of the layers, and the output projection."""
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp) + config.vocab_size * config.hidden_size


def prompt(seed: int, length: int, vocab: int) -> list[int]:
    """`length` random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab, (length,), generator=generator).tolist()
