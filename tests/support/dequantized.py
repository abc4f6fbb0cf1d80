"""A checkpoint with the values that 8-bit weights stand for, so that transformers can say what they must give."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def dequantized(folder: Path, to: Path) -> Path:
    """A copy of a dense model's `folder` in float32 whose matrices are rounded to integers times a scale.

    Written from the definition, without the engine's code. A tied output projection becomes one of its own.
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
