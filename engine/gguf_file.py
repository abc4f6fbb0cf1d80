"""A GGUF file: its metadata as typed fields, and where each of its tensors lies.

The header is walked here rather than by the `gguf` library's own reader, which makes an array of every string and takes
seconds for a vocabulary; that the two see the same is a test. What the values of a tensor are is the library's word
alone.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from kvbaton.settings import ConfigError

SUFFIX = ".gguf"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


def find_gguf(model: Path) -> Path | None:
    """The GGUF file that `model` names: itself, or the only one of a folder without config.json; None for others.

    Raises `ConfigError` for a folder with several.
    """
    if model.suffix == SUFFIX and not model.is_dir():
        if not model.exists():
            raise ConfigError(f"model file {model} does not exist")
        return model
    if not model.is_dir() or (model / "config.json").exists():
        return None
    files = sorted(model.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise ConfigError(f"{model} holds {len(files)} {SUFFIX} files; name one of them, for example {files[0]}")
    return files[0] if files else None


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` has the rows first, as torch has; `offset` counts bytes from the start of the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * block_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A header that has been read; the values of tensors stay in the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Raises `ConfigError` for what is no GGUF file, is cut short, or holds a kind of value that is not known."""
        try:
            with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, data)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, struct.error, IndexError, KeyError) as error:
            raise ConfigError(f"{path} is not a readable GGUF file: {error}") from error

    def error(self, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: {message}")

    @property
    def architecture(self) -> str:
        """The family, in llama.cpp's words; also the prefix of the metadata that describes the model."""
        return self.string("general.architecture")

    @property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(tensor.name for tensor in self.tensors)

    def values(self, tensor: GgufTensor) -> np.ndarray:
        """Its numbers, dequantized: float32 of `tensor.shape`. Raises `ConfigError` for a kind that has no such."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        columns = tensor.shape[-1] // block * block_bytes
        stored = np.memmap(self.path, mode="r", offset=tensor.offset, shape=(*tensor.shape[:-1], columns))
        try:
            return dequantize(stored, tensor.kind).reshape(tensor.shape)
        except NotImplementedError:
            raise self.error(f"{tensor.name} is of kind {tensor.kind.name}, which is not supported") from None

    def has(self, key: str) -> bool:
        return key in self.metadata

    def string(self, key: str) -> str:
        value = self._value(key, str)
        assert isinstance(value, str)
        return value

    def optional_string(self, key: str) -> str | None:
        return self.string(key) if self.has(key) else None

    def integer(self, key: str) -> int:
        value = self._value(key, int)
        assert isinstance(value, int)
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if self.has(key) else None

    def optional_number(self, key: str) -> float | None:
        return float(self._value(key, (int, float))) if self.has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._value(key, bool)) if self.has(key) else default

    def array(self, key: str) -> list[Any] | None:
        """None where the file has none of this name."""
        if not self.has(key):
            return None
        value: list[Any] = self._value(key, list)
        return value

    def _value(self, key: str, wanted: type | tuple[type, ...]) -> Any:
        if key not in self.metadata:
            raise self.error(f"{key} is missing")
        value = self.metadata[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise self.error(f"{key} is of an unexpected type, {type(value).__name__}")
        return value


class _Cursor:
    """Reads the header's values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.position = 0

    def numbers(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self._data, self.position)
        self.position += struct.calcsize(f"<{layout}")
        return values

    def text(self) -> str:
        (length,) = self.numbers("Q")
        end = self.position + length
        if end > len(self._data):
            raise ValueError(f"a text at byte {self.position} runs past the end of the file")
        text = self._data[self.position : end].decode("utf-8", errors="replace")
        self.position = end
        return text

    def value(self, kind: GGUFValueType) -> Any:
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind is GGUFValueType.STRING:
            return self.text()
        element, count = self.numbers("IQ")
        inner = GGUFValueType(element)
        if inner in _SCALARS:
            return list(self.numbers(f"{count}{_SCALARS[inner]}"))
        return [self.value(inner) for _ in range(count)]


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    magic, version, num_tensors, num_fields = cursor.numbers("IIQQ")
    if magic != GGUF_MAGIC:
        raise ValueError("it does not begin with GGUF")
    if version not in _VERSIONS:
        raise ValueError(f"version {version} is not supported; supported: {', '.join(map(str, _VERSIONS))}")
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.text()
        metadata[key] = cursor.value(GGUFValueType(cursor.numbers("I")[0]))
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    alignment = int(metadata.get(_ALIGNMENT, GGUF_DEFAULT_ALIGNMENT))
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(GgufTensor(name, kind, shape, start + offset) for name, kind, shape, offset in entries)
    for tensor in tensors:
        if tensor.offset + tensor.num_bytes > len(data):
            raise ValueError(f"it is cut short: {tensor.name} ends past the end of the file")
    return GgufFile(path, metadata, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
    name = cursor.text()
    (dimensions,) = cursor.numbers("I")
    shape = tuple(reversed(cursor.numbers(f"{dimensions}Q")))
    kind, offset = cursor.numbers("IQ")
    return name, GGMLQuantizationType(kind), shape, offset
