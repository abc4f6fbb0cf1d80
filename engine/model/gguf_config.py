"""What a GGUF file's metadata says of its model, in the words of config.json, for `hf_config` to judge like any other.

llama.cpp computes one family, `llama`, for what transformers calls Llama, Mistral and Mixtral. Scales and caps that the
decoder does not have are refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from kvbaton.engine.gguf_file import GgufFile
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.model_config import Architecture

ROPE_FACTORS = "rope_freqs.weight"
_FAMILIES = {"llama": Architecture.LLAMA, "qwen2": Architecture.QWEN2, "qwen3": Architecture.QWEN3}
_EXPERT_FAMILIES = {"llama": Architecture.MIXTRAL, "qwen3moe": Architecture.QWEN3_MOE}
_NOT_COMPUTED = (
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "attn_logit_softcapping",
    "embedding_scale",
    "expert_shared_count",
    "expert_weights_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
)
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Llama 3.1 and later; such a file stores the factors that follow from these, not these.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_fields(file: GgufFile) -> JsonFields:
    """The fields of the config.json that the file was made from. Raises `ConfigError` for a family or number that is
    missing or not supported."""
    family = file.architecture
    experts = file.optional_integer(f"{family}.expert_count") or 0
    architecture = (_EXPERT_FAMILIES if experts else _FAMILIES).get(family)
    if architecture is None:
        supported = ", ".join(sorted({*_FAMILIES, *_EXPERT_FAMILIES}))
        with_experts = " with experts" if experts and family in _FAMILIES else ""
        raise file.error(f"architecture {family}{with_experts} is not supported; supported: {supported}")
    if (file.optional_integer("split.count") or 1) > 1:
        raise file.error("one of several parts; join them first with llama-gguf-split --merge")
    for name in _NOT_COMPUTED:
        if file.has(f"{family}.{name}") and file.metadata[f"{family}.{name}"] not in (0, 1):
            raise file.error(f"{family}.{name} is not supported")
    window = file.optional_integer(f"{family}.attention.sliding_window")
    if window and architecture is Architecture.LLAMA:
        architecture = Architecture.MISTRAL
    values = _sizes(file, family) | _flags(file) | {"architectures": [architecture.value], "sliding_window": window}
    values["rope_parameters"] = _rope(file, family, values["head_dim"])
    if experts:
        values |= _experts(file, family, architecture, experts)
    return JsonFields(str(file.path), values)


def _sizes(file: GgufFile, family: str) -> dict[str, Any]:
    hidden, heads = file.integer(f"{family}.embedding_length"), file.integer(f"{family}.attention.head_count")
    head_dim = file.optional_integer(f"{family}.attention.key_length") or hidden // max(heads, 1)
    if file.optional_integer(f"{family}.attention.value_length") not in (None, head_dim):
        raise file.error("attention.value_length that differs from the keys' is not supported")
    inner = file.optional_integer(f"{family}.feed_forward_length")
    return {
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden,
        "intermediate_size": inner or file.integer(f"{family}.expert_feed_forward_length"),
        "num_hidden_layers": file.integer(f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.optional_integer(f"{family}.attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "rms_norm_eps": file.optional_number(f"{family}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": file.integer(f"{family}.context_length"),
    }


def _flags(file: GgufFile) -> dict[str, Any]:
    names = file.tensor_names
    ends = (file.optional_integer(f"tokenizer.ggml.{name}") for name in _END_TOKENS)
    return {
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_gate.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": _dtype(file),
        "eos_token_id": sorted({token for token in ends if token is not None}),
    }


def _dtype(file: GgufFile) -> str:
    """The matrices' own; bfloat16 for quantized ones, whose scales it holds well enough to be served."""
    kinds = {tensor.kind for tensor in file.tensors if len(tensor.shape) > 1}
    if kinds <= {GGMLQuantizationType.F32}:
        return "float32"
    return "float16" if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16} else "bfloat16"


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding: a vocabulary may be padded beyond its tokens."""
    for tensor in file.tensors:
        if tensor.name == "token_embd.weight":
            return tensor.shape[0]
    raise file.error("token_embd.weight is missing")


def _experts(file: GgufFile, family: str, architecture: Architecture, experts: int) -> dict[str, Any]:
    top_k = file.integer(f"{family}.expert_used_count")
    if architecture is Architecture.MIXTRAL:
        return {"num_local_experts": experts, "num_experts_per_tok": top_k}
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": file.integer(f"{family}.expert_feed_forward_length"),
        "mlp_only_layers": [
            layer
            for layer in range(file.integer(f"{family}.block_count"))
            if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensor_names
        ],
        "norm_topk_prob": True,  # llama.cpp computes this family no other way, and stores no flag
    }


def _rope(file: GgufFile, family: str, head_dim: int) -> dict[str, Any]:
    rotated = file.optional_integer(f"{family}.rope.dimension_count")
    if rotated not in (None, head_dim):
        raise file.error(f"{family}.rope.dimension_count {rotated} of heads of {head_dim} is not supported")
    theta = file.optional_number(f"{family}.rope.freq_base") or 1e4
    kind = file.optional_string(f"{family}.rope.scaling.type") or "none"
    factor = file.optional_number(f"{family}.rope.scaling.factor")
    factors = next((tensor for tensor in file.tensors if tensor.name == ROPE_FACTORS), None)
    if factors is not None:
        return {"rope_theta": theta} | _from_factors(file, file.values(factors), theta, head_dim)
    if kind == "none" or (kind == "linear" and factor is None):
        return {"rope_theta": theta}
    trained = file.optional_integer(f"{family}.rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": trained}
    betas = {name: file.optional_number(f"{family}.rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return scaling | betas


def _from_factors(file: GgufFile, stored: np.ndarray, theta: float, head_dim: int) -> dict[str, Any]:
    """The llama3 scaling whose divisors of the frequencies, [head_dim / 2], are `stored`."""
    factor = float(stored.max())
    waves = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, trained = _LLAMA3.values()
    smooth = np.clip((trained / waves - low) / (high - low), 0.0, 1.0)
    if stored.shape != waves.shape or not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise file.error(f"{ROPE_FACTORS} holds factors that are not Llama 3's, which is not supported")
    return {} if factor == 1.0 else {"rope_type": "llama3", "factor": round(factor, 4)} | _LLAMA3
