"""GGUF files made of the tiny checkpoints, as llama.cpp's converter writes them: with the `gguf` library's writer and
names, without the engine's code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from safetensors.numpy import load_file

FAMILIES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}
_EXPERTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def write_gguf(
    folder: Path,
    to: Path,
    family: str,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    **changes: Any,
) -> Path:
    """`folder` as one file. `changes` replace or add metadata, `a__b` for `a.b`; None takes an entry away."""
    config = json.loads((folder / "config.json").read_text())
    metadata = _metadata(config, FAMILIES[family]) | _tokenizer(folder, config)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = GGUFWriter(to, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, values in _tensors(folder, config, FAMILIES[family]):
        stored = kind if values.ndim > 1 and "norm" not in name else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _metadata(config: dict[str, Any], arch: MODEL_ARCH) -> dict[str, Any]:
    name = {MODEL_ARCH.LLAMA: "llama", MODEL_ARCH.QWEN2: "qwen2", MODEL_ARCH.QWEN3: "qwen3"}.get(arch, "qwen3moe")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    experts = config.get("num_local_experts") or config.get("num_experts")
    window = config.get("sliding_window") if name == "llama" else None
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.sliding_window": window,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 1e4),
        "expert_count": experts,
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in values.items()}


def _tokenizer(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    stored = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token["id"] for token in stored["added_tokens"]}
    ids = stored["model"]["vocab"] | added
    tokens = sorted(ids, key=lambda token: ids[token])
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in added else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": ids[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": ids[settings["eos_token"]],
        "tokenizer.ggml.eot_token_id": ids[settings["pad_token"]],
        "tokenizer.chat_template": settings["chat_template"],
    }


def _tensors(folder: Path, config: dict[str, Any], arch: MODEL_ARCH) -> list[tuple[str, np.ndarray]]:
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    dense = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    found: list[tuple[str, np.ndarray]] = []
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, values in load_file(folder / "model.safetensors").items():
        values = values.astype(np.float32)
        if ".experts." in name:
            layer, number, part = name.split(".")[2], int(name.split(".")[-3]), _EXPERTS[name.split(".")[-2]]
            experts.setdefault(f"blk.{layer}.ffn_{part}_exps.weight", {})[number] = values
            continue
        stem, _, suffix = name.rpartition(".")
        if arch is MODEL_ARCH.LLAMA and stem.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            values = _interleaved(values, heads)
        found.append((f"{names.get_name(stem) or dense.get_name(stem)}.{suffix}", values))
    stacked = [(name, np.stack([by[i] for i in sorted(by)])) for name, by in experts.items()]
    return found + stacked


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of a Llama."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
