"""Safetensors folders: which tensors they hold, loading them into the decoder's buffers, and a digest of their bytes.

Files are memory-mapped and each tensor is copied once, straight into its slot on the device and in its dtype, or
quantized into it a few rows at a time: no second copy of the model ever exists. Names and shapes are all checked before
the first byte is copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvbaton.engine.config import ConfigError
from kvbaton.engine.model.hf_config import DTYPES
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.matrix import plain
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.weight_files import SINGLE_FILE, open_weights, weight_files
from kvbaton.engine.model.weights import DecoderWeights, ExpertNaming, Slot, empty_weights, slots, tie

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_SAMPLE_BYTES = 512
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a checkpoint keeps one tensor. `offset` counts bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder, sorted by name."""

    folder: Path
    tensors: tuple[StoredTensor, ...]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of every safetensors file; raises `ConfigError` naming a missing or damaged one."""
        tensors = [tensor for path in weight_files(folder) for tensor in _read_header(path)]
        tensors.sort(key=lambda tensor: tensor.name)
        for one, other in pairwise(tensors):
            if one.name == other.name:
                raise ConfigError(f"tensor {one.name} is in {one.file} and again in {other.file}")
        return cls(folder, tuple(tensors))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

    def digest(self) -> str:
        """Hex digest of every tensor's name, dtype, shape and a sample of its bytes; independent of the sharding."""
        state = hashlib.blake2b(digest_size=16)
        handles = {path: path.open("rb") for path in {tensor.file for tensor in self.tensors}}
        try:
            for tensor in self.tensors:
                handle = handles[tensor.file]
                handle.seek(tensor.offset + max(0, tensor.num_bytes - _SAMPLE_BYTES) // 2)
                state.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
                state.update(handle.read(min(_SAMPLE_BYTES, tensor.num_bytes)))
        finally:
            for handle in handles.values():
                handle.close()
        return state.hexdigest()


def fingerprint(config: ModelConfig, weights_digest: str) -> str:
    """What two engines compare before they exchange KV: equal exactly when model and weights are (samples of them)."""
    return hashlib.blake2b(f"{config.digest()} {weights_digest}".encode(), digest_size=16).hexdigest()


def load_weights(
    config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> DecoderWeights:
    """The model's weights on `device` in `dtype`, its matrices quantized from the values as they are stored.

    Raises `ConfigError` for missing, unexpected or misshapen tensors.
    """
    weights = empty_weights(config, dtype, device, quantization)
    by_name = {slot.name: slot for slot in slots(config, weights, _expert_naming(checkpoint))}
    _check_names(config, checkpoint, frozenset(by_name))
    for tensor in checkpoint.tensors:
        if tensor.name in by_name:
            _check_tensor(tensor, by_name[tensor.name])
    for path in sorted({tensor.file for tensor in checkpoint.tensors}):
        _copy_file(path, [by_name[t.name] for t in checkpoint.tensors if t.file == path and t.name in by_name])
    tie(config, weights)
    return weights


def _read_header(path: Path) -> Iterator[StoredTensor]:
    """The 8-byte length and JSON header of a safetensors file, checked by the library first."""
    with open_weights(path):
        pass
    with path.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        header = JsonFields.parse(str(path), handle.read(header_bytes))
    for name in header.names():
        entry = header.section(name)
        if name == "__metadata__" or entry is None:
            continue
        begin, end = entry.integers("data_offsets")
        shape = entry.integers("shape")
        yield StoredTensor(name, path, entry.string("dtype"), shape, 8 + header_bytes + begin, end - begin)


def _expert_naming(checkpoint: Checkpoint) -> ExpertNaming:
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in checkpoint.names)
    return ExpertNaming.STACKED if stacked else ExpertNaming.PER_EXPERT


def _check_names(config: ModelConfig, checkpoint: Checkpoint, expected: frozenset[str]) -> None:
    found = frozenset(name for name in checkpoint.names if not name.endswith(".rotary_emb.inv_freq"))
    if config.tie_word_embeddings:
        found -= {"lm_head.weight"}
    missing, unexpected = expected - found, found - expected
    if missing:
        raise ConfigError(f"{checkpoint.folder} lacks {_some(missing)} of a {config.architecture}")
    if unexpected:
        raise ConfigError(f"{checkpoint.folder} holds unexpected {_some(unexpected)} for a {config.architecture}")


def _some(names: frozenset[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{'tensor' if len(names) == 1 else f'{len(names)} tensors:'} {shown}{more}"


def _check_tensor(tensor: StoredTensor, slot: Slot) -> None:
    if tensor.dtype not in _FLOATS:
        raise ConfigError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}, which is not supported; supported: {', '.join(DTYPES)}"
        )
    if tensor.shape != tuple(slot.target.shape):
        raise ConfigError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}, config.json says {list(slot.target.shape)}"
        )


def _copy_file(path: Path, targets: list[Slot]) -> None:
    with open_weights(path) as handle:
        for slot in targets:
            try:
                slot.target.copy_(handle.get_tensor(slot.name))
            except ValueError as error:
                raise ConfigError(f"{path}: {slot.name} cannot be quantized: it {error}") from None


def save_weights(folder: Path, config: ModelConfig, weights: DecoderWeights, dtype: torch.dtype) -> None:
    """Write model.safetensors in `dtype`, under the names that hub checkpoints use."""
    tensors = {slot.name: plain(slot.target).to("cpu", dtype, copy=True) for slot in slots(config, weights)}
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})
