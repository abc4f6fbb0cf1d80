"""Weights from safetensors straight to the device: whether they are what was saved, and how fast they come.

The files have just been written, so they lie in the page cache: what is timed is the copy, not the disk.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpucheck.checks import CheckResult
from gpucheck.results import LoadResult
from gpucheck.timing import Clock

from kvbaton.engine.model.checkpoint import Checkpoint
from kvbaton.engine.model.loader import load_weights, resolve_dtype, save_weights
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.random_weights import random_weights
from kvbaton.engine.model.weights import DecoderWeights, plain, slots


def load(config: ModelConfig, name: str, clock: Clock) -> Iterator[LoadResult | CheckResult]:
    """Random weights of `config`, saved and loaded again."""
    dtype = resolve_dtype(config, "auto")
    saved = random_weights(config, 1, dtype, clock.device)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder), config, saved, dtype)
        checkpoint = Checkpoint.open(Path(folder))
        clock.settle()
        began = time.perf_counter()
        loaded = load_weights(config, checkpoint, dtype, clock.device)
        clock.settle()
        seconds = time.perf_counter() - began
    yield LoadResult(name, checkpoint.num_bytes, seconds)
    yield CheckResult("weights loaded = saved", float(_different(config, loaded, saved)), 0.0, seconds)


def _different(config: ModelConfig, one: DecoderWeights, other: DecoderWeights) -> int:
    """Tensors that are not equal to the bit."""
    pairs = zip(slots(config, one), slots(config, other), strict=True)
    return sum(not torch.equal(plain(a.target), plain(b.target)) for a, b in pairs)
