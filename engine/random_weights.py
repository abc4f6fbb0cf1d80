"""Random weights under which a model behaves: many different tokens, clear winners, no repetition of one token.

Stock initialisation makes a model that repeats itself whatever goes wrong in the cache. Here every product is scaled
by its fan-in, attention is sharpened, and the layers' outputs are large against the residual stream, so that a wrong
K, V or position changes the tokens. Made for tests and for benchmarks without a download.
"""

from __future__ import annotations

import math

import torch

from kvbaton.engine.model_config import ModelConfig
from kvbaton.engine.weights import DecoderWeights, Part, Slot, empty_weights, slots

_GAINS = {Part.Q: 1.6, Part.K: 1.6, Part.V: 1.0, Part.GATE: 1.0, Part.UP: 1.0, Part.ROUTER: 3.0, Part.LM_HEAD: 5.0}
_OUTPUT_GAIN = 2.0
_TIED_OUTPUT_GAIN = 8.0  # else the token just read, whose embedding is its own logit row, wins again


def random_weights(config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """The same values for the same (config, seed, dtype, kind of device)."""
    weights = empty_weights(config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    for slot in slots(config, weights):
        _fill(slot, config, generator)
    return weights


def random_digest(seed: int) -> str:
    """Stands for the digest of a checkpoint's bytes."""
    return f"random-{seed}"


def _fill(slot: Slot, config: ModelConfig, generator: torch.Generator) -> None:
    if slot.part is Part.NORM:
        slot.target.normal_(1.0, 0.1, generator=generator)
    elif slot.part is Part.QK_NORM:
        slot.target.normal_(1.6, 0.1, generator=generator)
    elif slot.part is Part.BIAS:
        slot.target.normal_(0.0, 0.1, generator=generator)
    elif slot.part is Part.EMBED:
        slot.target.normal_(0.0, 1.0, generator=generator)
    else:
        slot.target.normal_(0.0, _gain(slot.part, config) / math.sqrt(slot.target.shape[-1]), generator=generator)


def _gain(part: Part, config: ModelConfig) -> float:
    if part in (Part.OUT, Part.DOWN):
        return _TIED_OUTPUT_GAIN if config.tie_word_embeddings else _OUTPUT_GAIN
    if part in (Part.Q, Part.K) and config.qk_norm:
        return 1.0  # the norm over each head sets their size
    return _GAINS[part]
