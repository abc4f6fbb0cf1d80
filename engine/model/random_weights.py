"""Random weights under which a model behaves: many different tokens, clear winners, no repetition of one token.

Stock initialisation makes a model that repeats itself whatever goes wrong in the cache. Here every product is scaled
by its fan-in, attention is sharpened, and the layers' outputs are large against the residual stream, so that a wrong
K, V or position changes the tokens. Made for tests and for benchmarks without a download.
"""

from __future__ import annotations

import math

import torch

from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.weights import DecoderWeights, Int8Matrix, Part, empty_weights, slots, tie

_GAINS = {
    Part.QKV: 1.4,
    Part.Q: 1.6,
    Part.K: 1.6,
    Part.V: 1.0,
    Part.GATE: 1.0,
    Part.UP: 1.0,
    Part.ROUTER: 3.0,
    Part.LM_HEAD: 5.0,
}
_OUTPUT_GAIN = 2.0
_TIED_OUTPUT_GAIN = 8.0  # else the token just read, whose embedding is its own logit row, wins again


def random_weights(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> DecoderWeights:
    """The same values for the same (config, seed, dtype, kind of device); quantized, the integers nearest to them."""
    weights = empty_weights(config, dtype, device, quantization)
    generator = torch.Generator(device).manual_seed(seed)
    for slot in slots(config, weights):
        if isinstance(slot.target, Int8Matrix):
            values = torch.empty(slot.target.shape, dtype=dtype, device=device)
            _fill(values, slot.part, config, generator)
            slot.target.copy_(values)
        else:
            _fill(slot.target, slot.part, config, generator)
    tie(config, weights)
    return weights


def random_digest(seed: int) -> str:
    """Stands for the digest of a checkpoint's bytes."""
    return f"random-{seed}"


def _fill(values: torch.Tensor, part: Part, config: ModelConfig, generator: torch.Generator) -> None:
    if part is Part.NORM:
        values.normal_(1.0, 0.1, generator=generator)
    elif part is Part.QK_NORM:
        values.normal_(1.6, 0.1, generator=generator)
    elif part is Part.BIAS:
        values.normal_(0.0, 0.1, generator=generator)
    elif part is Part.EMBED:
        values.normal_(0.0, 1.0, generator=generator)
    else:
        values.normal_(0.0, _gain(part, config) / math.sqrt(values.shape[-1]), generator=generator)


def _gain(part: Part, config: ModelConfig) -> float:
    if part in (Part.OUT, Part.DOWN):
        return _TIED_OUTPUT_GAIN if config.tie_word_embeddings else _OUTPUT_GAIN
    if part in (Part.Q, Part.K) and config.qk_norm:
        return 1.0  # the norm over each head sets their size
    return _GAINS[part]
