"""The safetensors files of a model folder: which they are, and whether they are whole. Imports without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvbaton.engine.config import ConfigError
from kvbaton.engine.model.json_fields import JsonFields

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def check_weight_files(folder: Path) -> None:
    """Raise `ConfigError` for a file that is missing, cut short or no safetensors; reads their headers only."""
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
        raise ConfigError(f"{folder} holds pickled weights (*.bin), which are not supported; supported: safetensors")
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
