"""Rotary tables: cos and sin of every position, computed once when the model loads.

Scaling follows the published formulas: LINEAR divides all frequencies; LLAMA3 (Llama 3.1) keeps wavelengths below
`original / high_freq_factor`, divides those above `original / low_freq_factor`, and blends linearly in between.
"""

from __future__ import annotations

import math

import torch

from kvbaton.engine.model.model_config import RopeConfig, RopeType


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32 on the CPU, in radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind is RopeType.LINEAR:
        return frequencies / rope.factor
    if rope.kind is RopeType.LLAMA3:
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """`turns`: how often a frequency goes round within the context that the model was first trained on."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / rope.factor


def rope_tables(
    rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [num_positions, head_dim / 2] float32: angles lose too much in 16 bits."""
    positions = torch.arange(num_positions, dtype=torch.int64).float()
    angles = positions.unsqueeze(1) * inverse_frequencies(rope, head_dim).unsqueeze(0)
    return angles.cos().to(device), angles.sin().to(device)
