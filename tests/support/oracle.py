"""What transformers says about the tiny checkpoints: greedy tokens, and the logits of a whole prompt.

One prompt at a time, in float32 on one thread; end-of-sequence ids do not stop it, as `ignore_eos` does here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvbaton.engine.tiny import Family, TinySpec, make_tiny, probe_prompts

FAMILIES = tuple(Family)
NUM_TOKENS = 64
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class TinyModels:
    """Tiny checkpoints, each made once in a folder that outlives the test."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, family: Family | str) -> Path:
        folder = self._root / str(family)
        if not (folder / "model.safetensors").exists():
            make_tiny(folder, TinySpec(family=Family(family)))
        return folder


def dequantized(folder: Path, to: Path) -> Path:
    """A copy of a dense model's `folder` in float32 whose matrices are rounded to integers times a scale.

    So transformers can say what 8-bit weights must give. Written from the definition, without the engine's code. A tied
    output projection becomes one of its own.
    """
    to.mkdir(parents=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    config = json.loads((to / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if config.pop("tie_word_embeddings", False):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (to / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    for name, tensor in tensors.items():
        if any(f"{part}.weight" in name for part in MATRICES):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (torch.round(tensor / scale) * scale).float()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def prompts() -> list[list[int]]:
    """Seven prompts of 4 to 201 token ids, on which every tiny checkpoint has clear winners for 64 tokens."""
    return probe_prompts()


def oracle_tokens(folder: Path, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """Greedy continuation by transformers' `generate`; kept, so asking again is free."""
    return list(_generated(folder, tuple(prompt), num_tokens))


def oracle_logits(folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """[len(prompt), vocab] float32."""
    with torch.inference_mode():
        logits: torch.Tensor = reference_model(folder)(torch.tensor([list(prompt)])).logits[0]
    return logits


@cache
def reference_model(folder: Path) -> Any:
    """The transformers model of a folder, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@cache
def _generated(folder: Path, prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = reference_model(folder).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )
    return tuple(out[0, len(prompt) :].tolist())
