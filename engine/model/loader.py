"""From a folder, a GGUF file, or nothing but a config, to a decoder on its device.

A checkpoint's files are memory-mapped and each tensor is copied once, straight into its slot on the device and in its
dtype, or quantized into it a few rows at a time: no second copy of the model ever exists. Names and shapes are all
checked before the first byte is copied.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvbaton.engine.gguf_file import GgufFile, find_gguf
from kvbaton.engine.model.checkpoint import SINGLE_FILE, Checkpoint, StoredTensor
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.gguf_checkpoint import GgufCheckpoint
from kvbaton.engine.model.hf_config import DTYPES, load_model_config
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.random_weights import random_digest, random_weights
from kvbaton.engine.model.weights import (
    DecoderWeights,
    ExpertNaming,
    WeightSlot,
    empty_weights,
    plain,
    slots,
    tie,
)
from kvbaton.kernels.backend import kernels_for
from kvbaton.settings import ConfigError

log = logging.getLogger(__name__)

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES_SHOWN = 5
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ENDS = frozenset({_EMBED, _HEAD})

AnyCheckpoint = Checkpoint | GgufCheckpoint


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
    checkpoint = open_checkpoint(folder, config)
    config = replace(config, rope=config.rope.at_length(max_positions or config.max_position_embeddings))
    chosen = resolve_dtype(config, dtype)
    config = _untied(config, checkpoint, chosen)
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
    """A model of `random_weights`, for benchmarks and tests."""
    weights = random_weights(config, seed, resolve_dtype(config, dtype), device, quantization)
    decoder = Decoder(config, weights, kernels_for(device), max_positions)
    return LoadedModel(config, decoder, fingerprint(config, random_digest(seed)))


def resolve_dtype(config: ModelConfig, name: str) -> torch.dtype:
    """The torch dtype of a setting; auto takes the model's own."""
    chosen = config.dtype if name == "auto" else name
    if chosen not in _TORCH_DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    return _TORCH_DTYPES[chosen]


def open_checkpoint(model: Path, config: ModelConfig) -> AnyCheckpoint:
    """The weights that `model`, a folder or a GGUF file, holds."""
    gguf = find_gguf(model)
    return Checkpoint.open(model) if gguf is None else GgufCheckpoint(GgufFile.open(gguf), config)


def _untied(config: ModelConfig, checkpoint: AnyCheckpoint, dtype: torch.dtype) -> ModelConfig:
    """The same, without the tie where the checkpoint holds an output projection that in `dtype` is not the embedding.
    transformers decides alike."""
    if not config.tie_word_embeddings or not checkpoint.names >= _ENDS:
        return config
    one, other = (values for _, values in checkpoint.values(_ENDS))
    if one.shape == other.shape and torch.equal(one.to(dtype), other.to(dtype)):
        return config
    log.info("%s holds an lm_head.weight unlike its embedding: used, despite tie_word_embeddings", checkpoint.origin)
    return replace(config, tie_word_embeddings=False)


def load_weights(
    config: ModelConfig, checkpoint: AnyCheckpoint, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> DecoderWeights:
    """The model's weights on `device` in `dtype`, its matrices quantized from the values as they are stored.

    Raises `ConfigError` for missing, unexpected or misshapen tensors.
    """
    weights = empty_weights(config, dtype, device, quantization)
    by_name = {slot.name: slot for slot in slots(config, weights, _expert_naming(checkpoint))}
    if config.tie_word_embeddings and checkpoint.names & _ENDS == {_HEAD}:
        by_name[_HEAD] = by_name.pop(_EMBED)  # of two that are one, either may be the one that is stored
    _check_names(config, checkpoint, frozenset(by_name))
    for tensor in checkpoint.tensors:
        if tensor.name in by_name:
            _check_tensor(tensor, by_name[tensor.name], checkpoint.kinds)
    for name, values in checkpoint.values(frozenset(by_name)):
        try:
            by_name[name].target.copy_(values)
        except ValueError as error:
            raise ConfigError(f"{checkpoint.origin}: {name} cannot be quantized: it {error}") from None
    tie(config, weights)
    return weights


def save_weights(folder: Path, config: ModelConfig, weights: DecoderWeights, dtype: torch.dtype) -> None:
    """Write model.safetensors in `dtype`, under the names that hub checkpoints use."""
    tensors = {slot.name: plain(slot.target).to("cpu", dtype, copy=True) for slot in slots(config, weights)}
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def fingerprint(config: ModelConfig, weights_digest: str) -> str:
    """What two engines compare before they exchange KV: equal exactly when model and weights are (samples of them)."""
    return hashlib.blake2b(f"{config.digest()} {weights_digest}".encode(), digest_size=16).hexdigest()


def _expert_naming(checkpoint: AnyCheckpoint) -> ExpertNaming:
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in checkpoint.names)
    return ExpertNaming.STACKED if stacked else ExpertNaming.PER_EXPERT


def _check_names(config: ModelConfig, checkpoint: AnyCheckpoint, expected: frozenset[str]) -> None:
    found = frozenset(name for name in checkpoint.names if not name.endswith(".rotary_emb.inv_freq"))
    if config.tie_word_embeddings and _HEAD not in expected:
        found -= {_HEAD}
    missing, unexpected = expected - found, found - expected
    if missing:
        raise ConfigError(f"{checkpoint.origin} lacks {_some(missing)} of a {config.architecture}")
    if unexpected:
        raise ConfigError(f"{checkpoint.origin} holds unexpected {_some(unexpected)} for a {config.architecture}")


def _some(names: frozenset[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{'tensor' if len(names) == 1 else f'{len(names)} tensors:'} {shown}{more}"


def _check_tensor(tensor: StoredTensor, slot: WeightSlot, kinds: frozenset[str]) -> None:
    if tensor.dtype not in kinds:
        supported = ", ".join(sorted(kinds))
        raise ConfigError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}, which is not supported; supported: {supported}"
        )
    if tensor.shape != tuple(slot.target.shape):
        raise ConfigError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, its config says {list(slot.target.shape)}"
        )
