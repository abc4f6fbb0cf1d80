"""Reads how config.json scales rotary positions into a `RopeConfig`, with transformers' precedence and defaults.

`rope_scaling` replaces `rope_parameters` where both are there, and a value of either stands before the one beside it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.model_config import Architecture, RopeConfig, RopeType

_OLD_STYLE, _NEW_STYLE = "rope_scaling", "rope_parameters"


def read_rope(fields: JsonFields, arch: Architecture) -> RopeConfig:
    """Raises `ConfigError` for a type that is not computed here, and for values that have no meaning."""
    section = fields.section(_OLD_STYLE) or fields.section(_NEW_STYLE) or fields.empty_section(_OLD_STYLE)
    if any(section.has(layers) for layers in ("full_attention", "sliding_attention")):
        raise fields.error("rope parameters that differ by layer type are not supported")
    theta = section.number("rope_theta", fields.number("rope_theta", 1e6 if arch is Architecture.MIXTRAL else 1e4))
    _refuse_lost_theta(fields, theta)
    partial = section.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0 and arch is not Architecture.PHI3:
        raise fields.error(f"partial_rotary_factor other than 1 is not supported for a {arch}")
    name = section.string("rope_type", section.string("type", "default"))
    if arch is Architecture.PHI3 and name in ("su", "yarn"):
        name = RopeType.LONGROPE  # what early files of the family called it
    if name not in {kind.value for kind in RopeType}:
        raise fields.error(f"rope type {name!r} is not supported; supported: {', '.join(RopeType)}")
    rope = _read_kind(fields, section, arch, RopeConfig(theta, RopeType(name), rotary_factor=partial))
    _check(fields, rope)
    return rope


def check_rope_sizes(fields: JsonFields, rope: RopeConfig, head_dim: int) -> None:
    """Raise `ConfigError` unless what turns of a head are pairs, each with a factor where factors are listed."""
    size = rope.rotary_dim(head_dim)
    if size < 2 or size > head_dim or size % 2:
        of = "" if rope.rotary_factor == 1.0 else f" with partial_rotary_factor {rope.rotary_factor:g}"
        raise fields.error(f"head_dim {head_dim}{of} is odd; rotary embedding needs pairs")
    for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
        if rope.kind is RopeType.LONGROPE and len(factors) != size // 2:
            raise fields.error(f"{name} has {len(factors)} numbers, and {size // 2} pairs of each head turn")


def _refuse_lost_theta(fields: JsonFields, theta: float) -> None:
    replaced = fields.section(_NEW_STYLE) if fields.section(_OLD_STYLE) else None
    if replaced is not None and replaced.number("rope_theta", theta) != theta:
        raise fields.error(
            f"rope_scaling replaces rope_parameters, whose rope_theta {replaced.number('rope_theta'):g} would be lost "
            f"for {theta:g}; put all rope values into one of the two"
        )


def _read_kind(fields: JsonFields, section: JsonFields, arch: Architecture, rope: RopeConfig) -> RopeConfig:
    match rope.kind:
        case RopeType.LINEAR | RopeType.DYNAMIC:
            return replace(rope, factor=section.number("factor"))
        case RopeType.LLAMA3:
            return replace(
                rope,
                factor=section.number("factor"),
                low_freq_factor=section.number("low_freq_factor"),
                high_freq_factor=section.number("high_freq_factor"),
                original_max_positions=_original_length(fields, section, arch),
            )
        case RopeType.YARN:
            return _yarn(fields, section, replace(rope, original_max_positions=_original_length(fields, section, arch)))
        case RopeType.LONGROPE:
            return _longrope(
                fields, section, replace(rope, original_max_positions=_original_length(fields, section, arch))
            )
    return rope


def _original_length(fields: JsonFields, section: JsonFields, arch: Architecture) -> int:
    """What the model was first trained on: the top-level value stands before the section's; else the maximum length."""
    name = "original_max_position_embeddings"
    top = fields.optional_integer(name) or (4096 if arch is Architecture.PHI3 else None)
    length = top or section.optional_integer(name) or fields.integer("max_position_embeddings")
    if length < 2:
        raise fields.error(f"{name} must be at least 2, got {length}")
    return length


def _ratio(fields: JsonFields, rope: RopeConfig) -> float:
    return fields.integer("max_position_embeddings") / rope.original_max_positions


def _yarn(fields: JsonFields, section: JsonFields, rope: RopeConfig) -> RopeConfig:
    factor = section.number("factor", _ratio(fields, rope) if section.is_null("factor") else None)
    scale, scale_all = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
    attention = (
        _yarn_attention(factor, scale) / _yarn_attention(factor, scale_all)
        if scale and scale_all
        else _yarn_attention(factor, 1.0)
    )
    return replace(
        rope,
        factor=factor,
        attention_factor=section.number("attention_factor", attention),
        beta_fast=section.number("beta_fast", 0.0) or 32.0,
        beta_slow=section.number("beta_slow", 0.0) or 1.0,
        truncate=section.flag("truncate", True),
    )


def _yarn_attention(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(fields: JsonFields, section: JsonFields, rope: RopeConfig) -> RopeConfig:
    factor = section.number("factor", _ratio(fields, rope))
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_max_positions))
    return replace(
        rope,
        factor=factor,
        attention_factor=section.number("attention_factor", attention),
        short_factors=section.numbers("short_factor"),
        long_factors=section.numbers("long_factor"),
    )


def _check(fields: JsonFields, rope: RopeConfig) -> None:
    if rope.theta <= 0 or rope.factor <= 0 or rope.attention_factor <= 0:
        raise fields.error(
            f"rope_theta {rope.theta:g}, factor {rope.factor:g} and attention_factor {rope.attention_factor:g} must be "
            "above 0"
        )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise fields.error(
            f"high_freq_factor {rope.high_freq_factor:g} must exceed low_freq_factor {rope.low_freq_factor:g}"
        )
    if rope.kind is RopeType.YARN and (rope.theta <= 1 or min(rope.beta_fast, rope.beta_slow) <= 0):
        raise fields.error("yarn needs a rope_theta above 1, and beta_fast and beta_slow above 0")
    if any(factor <= 0 for factor in (*rope.short_factors, *rope.long_factors)):
        raise fields.error("short_factor and long_factor must be numbers above 0")
