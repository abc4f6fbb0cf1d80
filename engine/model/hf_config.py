"""Reads config.json (and generation_config.json) of a Hugging Face folder into a `ModelConfig`.

Both styles are read: `rope_theta` / `rope_scaling` / `torch_dtype`, and `rope_parameters` / `dtype` of transformers 5.
Whatever would change the arithmetic and is not implemented is refused by name: a model that loads computes what
transformers computes.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from kvbaton.engine.gguf_file import GgufFile, find_gguf
from kvbaton.engine.model.checkpoint import Checkpoint
from kvbaton.engine.model.gguf_config import gguf_fields
from kvbaton.engine.model.hf_rope import check_rope_sizes, read_rope
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.model_config import Architecture, ModelConfig, MoeConfig, RopeConfig, RopeType
from kvbaton.settings import ConfigError

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")
_MODEL_TYPES = {
    Architecture.LLAMA: "llama",
    Architecture.QWEN2: "qwen2",
    Architecture.QWEN3: "qwen3",
    Architecture.MISTRAL: "mistral",
    Architecture.MIXTRAL: "mixtral",
    Architecture.QWEN3_MOE: "qwen3_moe",
    Architecture.PHI3: "phi3",
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_QWEN = (Architecture.QWEN2, Architecture.QWEN3, Architecture.QWEN3_MOE)
_MOE = (Architecture.MIXTRAL, Architecture.QWEN3_MOE)


def load_model_config(folder: Path) -> ModelConfig:
    """The model in `folder`, or in the GGUF file of that path.

    Raises `ConfigError` naming the file and field that is missing, damaged or unsupported.
    """
    gguf = find_gguf(folder)
    if gguf is not None:
        fields = gguf_fields(GgufFile.open(gguf))
        config = parse_model_config(fields)
        _check_sizes(fields, config)
        return config
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder} does not exist or is not a folder")
    fields = JsonFields.read(folder / "config.json")
    config = parse_model_config(fields, _generation_eos(folder / "generation_config.json"))
    _check_sizes(fields, config)
    return config if fields.has("dtype") or fields.has("torch_dtype") else _with_stored_dtype(config, folder)


def check_quantization(model: ModelConfig, quantization: str) -> None:
    """Raise `ConfigError` for a model whose weights this engine cannot quantize."""
    if quantization == "int8" and model.moe is not None:
        raise ConfigError(f"quantization int8 is for models without experts; this one is a {model.architecture}")


def parse_model_config(fields: JsonFields, extra_eos: tuple[int, ...] = ()) -> ModelConfig:
    """`extra_eos` are the end-of-sequence ids of generation_config.json, added to those of config.json."""
    arch = _architecture(fields)
    _refuse_unsupported(fields, arch)
    num_layers = fields.integer("num_hidden_layers")
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    rope = read_rope(fields, arch)
    attention_bias = arch in (Architecture.LLAMA, Architecture.QWEN3, Architecture.QWEN3_MOE) and fields.flag(
        "attention_bias"
    )
    return ModelConfig(
        architecture=arch,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=_num_kv_heads(fields, arch, heads),
        head_dim=fields.optional_integer("head_dim")
        or (128 if arch is Architecture.QWEN3 else hidden // max(heads, 1)),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5 if arch in (Architecture.MIXTRAL, Architecture.PHI3) else 1e-6),
        max_position_embeddings=_max_positions(fields, rope),
        rope=rope,
        sliding_windows=_sliding_windows(fields, arch, num_layers),
        qkv_bias=attention_bias or arch is Architecture.QWEN2,
        o_bias=attention_bias,
        mlp_bias=arch is Architecture.LLAMA and fields.flag("mlp_bias"),
        qk_norm=arch in (Architecture.QWEN3, Architecture.QWEN3_MOE),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        moe=_moe(fields, arch, num_layers) if arch in _MOE else None,
        dtype=_dtype(fields),
        eos_token_ids=tuple(sorted({*fields.integers("eos_token_id"), *extra_eos})),
    )


def _architecture(fields: JsonFields) -> Architecture:
    names = fields.strings("architectures")
    supported = ", ".join(a.value for a in Architecture)
    if len(names) != 1:
        raise fields.error(f"architectures must name exactly one class, got {list(names)}; supported: {supported}")
    if names[0] not in {a.value for a in Architecture}:
        raise fields.error(f"architecture {names[0]} is not supported; supported: {supported}")
    return Architecture(names[0])


def _refuse_unsupported(fields: JsonFields, arch: Architecture) -> None:
    model_type = _MODEL_TYPES[arch]
    if fields.string("model_type", model_type) != model_type:
        found = fields.string("model_type")
        raise fields.error(f"model_type {found!r} contradicts architectures, which needs {model_type!r}")
    if fields.section("per_layer_config") is not None:
        raise fields.error("per_layer_config is not supported: all layers have the same sizes")
    act = fields.string("hidden_act", "silu")
    if act != "silu":
        raise fields.error(f"hidden_act {act!r} is not supported; supported: silu")
    for name in ("quantization_config", "compression_config"):
        if fields.has(name):
            raise fields.error(f"{name} (quantized weights) is not supported; supported: plain {', '.join(DTYPES)}")


def _max_positions(fields: JsonFields, rope: RopeConfig) -> int:
    """YaRN is added by hand to a config that keeps its first length, to be `factor` times as long."""
    named = fields.integer("max_position_embeddings")
    return max(named, int(rope.factor * rope.original_max_positions)) if rope.kind is RopeType.YARN else named


def _num_kv_heads(fields: JsonFields, arch: Architecture, heads: int) -> int:
    optional = arch in (Architecture.LLAMA, Architecture.PHI3)
    if fields.has("num_key_value_heads") or optional or fields.is_null("num_key_value_heads"):
        return fields.optional_integer("num_key_value_heads") or heads
    raise fields.error("num_key_value_heads is missing")


def _sliding_windows(fields: JsonFields, arch: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """One window per layer, None where a layer sees everything."""
    window = _window(fields, arch)
    types = fields.strings("layer_types")
    for name in types:
        if name not in (_FULL, _SLIDING):
            raise fields.error(f"layer type {name!r} is not supported; supported: {_FULL}, {_SLIDING}")
    if types and len(types) != num_layers:
        raise fields.error(f"layer_types has {len(types)} entries for {num_layers} layers")
    if arch in (Architecture.QWEN2, Architecture.QWEN3):
        first = fields.integer("max_window_layers", 28)
        types = types or tuple(_SLIDING if i >= first else _FULL for i in range(num_layers))
        return tuple(window if name == _SLIDING else None for name in types)
    expected = _FULL if window is None else _SLIDING
    if any(name != expected for name in types):
        raise fields.error(f"layer_types of {arch} must all be {expected} for sliding_window {window}")
    return (window,) * num_layers


def _window(fields: JsonFields, arch: Architecture) -> int | None:
    if arch is Architecture.LLAMA or (arch in _QWEN and not fields.flag("use_sliding_window")):
        return None
    missing_means = None if arch in (Architecture.MIXTRAL, Architecture.PHI3) else 4096
    if not fields.has("sliding_window") and not fields.is_null("sliding_window"):
        return missing_means
    return fields.optional_integer("sliding_window")


def _moe(fields: JsonFields, arch: Architecture, num_layers: int) -> MoeConfig:
    experts = fields.integer("num_local_experts" if fields.has("num_local_experts") else "num_experts")
    if fields.integer("num_experts", experts) != experts:
        raise fields.error(f"num_local_experts {experts} and num_experts {fields.integer('num_experts')} contradict")
    top_k = fields.integer("num_experts_per_tok")
    if not 1 <= top_k <= experts:
        raise fields.error(f"num_experts_per_tok {top_k} is not in [1, {experts}]")
    if arch is Architecture.MIXTRAL:
        return MoeConfig(experts, top_k, fields.integer("intermediate_size"), True, frozenset(range(num_layers)))
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.integers("mlp_only_layers")
    layers = frozenset(i for i in range(num_layers) if i not in dense and (i + 1) % max(step, 1) == 0)
    return MoeConfig(experts, top_k, fields.integer("moe_intermediate_size"), fields.flag("norm_topk_prob"), layers)


def _dtype(fields: JsonFields) -> str:
    name = fields.string("dtype", fields.string("torch_dtype", "float32")).removeprefix("torch.")
    if name not in DTYPES:
        raise fields.error(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return name


def _with_stored_dtype(config: ModelConfig, folder: Path) -> ModelConfig:
    stored = Checkpoint.open(folder).main_dtype or config.dtype
    log.info("%s names no dtype; most of its weights are %s", folder / "config.json", stored)
    return replace(config, dtype=stored)


def _generation_eos(path: Path) -> tuple[int, ...]:
    return JsonFields.read(path).integers("eos_token_id") if path.exists() else ()


def _check_sizes(fields: JsonFields, config: ModelConfig) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "max_position_embeddings"):
        if getattr(config, name) < 1:
            raise fields.error(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.num_heads % config.num_kv_heads:
        raise fields.error(
            f"num_attention_heads {config.num_heads} is not a multiple of {config.num_kv_heads} KV heads"
        )
    for window in config.sliding_windows:
        if window is not None and window < 1:
            raise fields.error(f"sliding_window must be at least 1, got {window}")
    check_rope_sizes(fields, config.rope, config.head_dim)
    for token in config.eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise fields.error(f"eos_token_id {token} is not in the vocabulary of {config.vocab_size}")
