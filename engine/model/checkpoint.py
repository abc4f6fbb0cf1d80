"""The safetensors files of a model folder: which they are, whether they are whole, what they hold, and a digest of it.

Imports without torch, so that a folder can be checked before anything heavy is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvbaton.engine.gguf_file import find_gguf
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.settings import ConfigError

FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names, and those of config.json
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SAMPLE_BYTES = 512


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
    """The tensors of a folder, sorted by name. `origin` is that folder, `kinds` what a stored number may be."""

    origin: Path
    tensors: tuple[StoredTensor, ...]
    kinds: frozenset[str] = frozenset(FLOATS)

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

    @property
    def main_dtype(self) -> str | None:
        """The float type that most bytes are stored in, as config.json would call it; None where there is none."""
        sizes = {name: sum(t.num_bytes for t in self.tensors if t.dtype == kind) for kind, name in FLOATS.items()}
        return max(sizes, key=lambda name: sizes[name]) if any(sizes.values()) else None

    def digest(self) -> str:
        """Hex digest of every tensor's name, dtype, shape and a sample of its bytes; independent of the sharding."""
        state = hashlib.blake2b(digest_size=16)
        handles = {path: path.open("rb") for path in {tensor.file for tensor in self.tensors}}
        try:
            for tensor in self.tensors:
                handle = handles[tensor.file]
                handle.seek(tensor.offset + max(0, tensor.num_bytes - SAMPLE_BYTES) // 2)
                state.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
                state.update(handle.read(min(SAMPLE_BYTES, tensor.num_bytes)))
        finally:
            for handle in handles.values():
                handle.close()
        return state.hexdigest()

    def values(self, names: frozenset[str]) -> Iterator[tuple[str, Any]]:
        """Each of `names` with its torch tensor, as it is stored, file by file."""
        for path in sorted({tensor.file for tensor in self.tensors}):
            with open_weights(path) as handle:
                for tensor in self.tensors:
                    if tensor.file == path and tensor.name in names:
                        yield tensor.name, handle.get_tensor(tensor.name)


def check_weight_files(folder: Path) -> None:
    """Raise `ConfigError` for a file that is missing, cut short or no safetensors; reads their headers only."""
    if find_gguf(folder) is not None:
        return  # a config that has been read from it is proof
    for path in weight_files(folder):
        with open_weights(path, framework="numpy"):
            pass


def weight_files(folder: Path) -> list[Path]:
    """The single file where there is one, as transformers chooses. Raises `ConfigError`."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        return _sharded_files(folder)
    if any(folder.glob("*.bin")):
        raise ConfigError(
            f"{folder} holds pickled weights (*.bin), which are not supported; supported: safetensors, gguf"
        )
    raise ConfigError(f"{folder / SINGLE_FILE} is missing, and so is {INDEX_FILE}")


def _sharded_files(folder: Path) -> list[Path]:
    index = JsonFields.read(folder / INDEX_FILE)
    weight_map = index.section("weight_map")
    if weight_map is None:
        raise index.error("weight_map is missing")
    names = {weight_map.string(name) for name in weight_map.names()}
    for name in names:
        if Path(name).name != name:
            raise index.error(f"weight_map names {name!r}, which is not a file of this folder")
        if not (folder / name).exists():
            raise ConfigError(f"{folder / name} is missing; {INDEX_FILE} names it")
    return [folder / name for name in sorted(names)]


@contextmanager
def open_weights(path: Path, framework: str = "pt") -> Iterator[Any]:
    """The open file; raises `ConfigError` unless its header is readable and it has as many bytes as that says."""
    try:
        handle = safe_open(path, framework=framework, device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error
    with handle as opened:
        yield opened


def _read_header(path: Path) -> Iterator[StoredTensor]:
    """The 8-byte length and JSON header of a safetensors file, checked by the library first."""
    with open_weights(path, framework="numpy"):
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
