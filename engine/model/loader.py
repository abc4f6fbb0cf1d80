"""From a folder, or from nothing but a config, to a decoder on its device."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kvbaton.engine.config import ConfigError
from kvbaton.engine.model.checkpoint import Checkpoint, fingerprint, load_weights
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.hf_config import DTYPES, load_model_config
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.random_weights import random_digest, random_weights
from kvbaton.kernels.backend import kernels_for

log = logging.getLogger(__name__)

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`fingerprint` is equal on two engines exactly when config and weights are, as they are stored."""

    config: ModelConfig
    decoder: Decoder
    fingerprint: str


def load_model(
    folder: Path,
    device: torch.device,
    dtype: str = "auto",
    max_positions: int | None = None,
    quantization: str = "none",
) -> LoadedModel:
    """Raises `ConfigError` that names the file, tensor or option at fault. `dtype` auto is the one saved."""
    config = load_model_config(folder)
    checkpoint = Checkpoint.open(folder)
    chosen = resolve_dtype(config, dtype)
    started = time.monotonic()
    weights = load_weights(config, checkpoint, chosen, device, quantization)
    took_s, gigabytes = time.monotonic() - started, checkpoint.num_bytes / 1e9
    held = "int8" if quantization == "int8" else str(chosen)
    log.info("%s: %.2f GB of weights on %s as %s in %.1f s", folder, gigabytes, device, held, took_s)
    decoder = Decoder(config, weights, kernels_for(device), max_positions)
    return LoadedModel(config, decoder, fingerprint(config, checkpoint.digest()))


def random_model(
    config: ModelConfig,
    seed: int,
    device: torch.device,
    dtype: str = "auto",
    max_positions: int | None = None,
    quantization: str = "none",
) -> LoadedModel:
    """A model that behaves, without a checkpoint: for benchmarks."""
    weights = random_weights(config, seed, resolve_dtype(config, dtype), device, quantization)
    decoder = Decoder(config, weights, kernels_for(device), max_positions)
    return LoadedModel(config, decoder, fingerprint(config, random_digest(seed)))


def resolve_dtype(config: ModelConfig, name: str) -> torch.dtype:
    """The torch dtype of a setting; auto takes the model's own."""
    chosen = config.dtype if name == "auto" else name
    if chosen not in _TORCH_DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return _TORCH_DTYPES[chosen]
