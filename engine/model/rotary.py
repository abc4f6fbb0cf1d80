"""cos and sin of every position that a model serves, for each way of scaling rotary frequencies.

The formulas are transformers' `ROPE_INIT_FUNCTIONS`. Two of them there depend on how long a sequence is by now, which
keys that are kept, shared between prompts and sent to other engines cannot follow: see `RopeConfig.at_length`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvbaton.engine.model.model_config import RopeConfig, RopeType


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """cos and sin of every position, each [num_positions, rotary_dim / 2] float32: angles lose too much in 16 bits.

    Dimensions of a head past `rotary_dim` do not turn.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> RotaryTables:
        positions = torch.arange(num_positions, dtype=torch.int64).float()
        angles = positions.unsqueeze(1) * inverse_frequencies(rope.at_length(num_positions), head_dim).unsqueeze(0)
        scale = rope.attention_factor
        return cls((angles.cos() * scale).to(device), (angles.sin() * scale).to(device))


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[rotary_dim / 2] float32 on the CPU, in radians per position; of LONGROPE after `at_length`."""
    size = rope.rotary_dim(head_dim)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    match rope.kind:
        case RopeType.LINEAR:
            return 1.0 / rope.theta**exponents / rope.factor
        case RopeType.LLAMA3:
            return _llama3(rope, 1.0 / rope.theta**exponents)
        case RopeType.YARN:
            return _yarn(rope, rope.theta**exponents, size)
        case RopeType.LONGROPE:
            return 1.0 / (torch.tensor(rope.short_factors, dtype=torch.float32) * rope.theta**exponents)
    return 1.0 / rope.theta**exponents


def _llama3(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1 keeps wavelengths below `original / high_freq_factor`, divides the frequencies of those above
    `original / low_freq_factor`, and blends linearly in between."""
    # how often a frequency goes round within the context that the model was first trained on
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / rope.factor


def _yarn(rope: RopeConfig, wavelengths: torch.Tensor, size: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): dimensions that turn more than `beta_fast` times within the first trained context keep
    their frequency, those with fewer than `beta_slow` turns are divided, and in between is a ramp."""
    low, high = (_dimension_of(turns, rope, size) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _dimension_of(turns: float, rope: RopeConfig, size: int) -> float:
    """Where the frequency goes round so often within the first trained context, in dimensions from the fastest."""
    return size * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
