"""An engine: weights and a KV pool on one device. What it computes, and for whom, is decided by its worker.

Engine.load(config)        weights from a folder, then a pool from the memory that is left
copy_blocks, launch        each step, always from the same thread
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace

import torch

from kvbaton.engine.batch import Pending, ScheduledRow
from kvbaton.engine.chunk_size import measured_chunk
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.cuda_graphs import CudaCapture, DecodeGraphs, GraphSizes
from kvbaton.engine.kv.kv_cache import KV_LAYOUT_VERSION, KVCache, KVGeometry
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.memory import num_blocks_for, step_workspace_bytes, usable_model_len
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.loader import LoadedModel, load_model
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.native_decoder import native_decoder
from kvbaton.engine.runner import ForwardPass, Runner
from kvbaton.engine.sampling.device_sampler import DeviceSampler
from kvbaton.kernels.backend import MAX_GATHERED_TOKENS, Kernels, kernels_for
from kvbaton.kernels.quantization import FP8
from kvbaton.settings import ConfigError

log = logging.getLogger(__name__)


def configure_threads(threads: int | None) -> None:
    """torch's thread count is the process's, so whoever owns the process calls this, before the engine loads."""
    if threads is None:
        return
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


class Engine:
    """The model, the books of its KV blocks (`kv`) and their memory (`cache`), and what a step may hold (`limits`)."""

    def __init__(self, config: EngineConfig, model: LoadedModel, device: torch.device) -> None:
        """Raises `ConfigError` where the settings do not fit the model or the device's memory."""
        self.config = config
        self.model_config: ModelConfig = model.config
        self.geometry = _geometry(model, config.cache)
        wanted = _max_model_len(config, model.config)
        flash_prefill = _flash_prefill(config, model, device)
        gathered_tokens = MAX_GATHERED_TOKENS if flash_prefill else 0
        workspace = step_workspace_bytes(model.config, config.batch, model.decoder.dtype.itemsize, gathered_tokens)
        num_blocks = num_blocks_for(config.cache, self.geometry, device, workspace)
        self.max_model_len = usable_model_len(wanted, num_blocks, self.geometry.block_size)
        self.kv = KVManager(num_blocks, self.geometry.block_size, config.cache.prefix_cache)
        self.cache = KVCache(self.geometry, num_blocks, device, scratch_blocks=1 if device.type == "cuda" else 0)
        self._fingerprint = model.fingerprint
        self._device = device
        self._kernels = kernels_for(device, self.geometry.dtype, flash_prefill)
        decoder = _forward_pass(model, self.geometry, self._kernels)
        graphs = device.type == "cuda" and config.cuda_graphs and isinstance(decoder, Decoder) and decoder.capturable
        self.pipelined = graphs if config.pipelined == "auto" else config.pipelined == "on"
        self._runner = self._make_runner(decoder, graphs)
        self.limits = self._measured_limits() if config.batch.prefill_chunk_tokens == "auto" else config.batch

    def _make_runner(self, decoder: ForwardPass, captured: bool) -> Runner:
        """Where steps are pipelined, and on CUDA, tokens are drawn on the device."""
        if self._device.type != "cuda" and not self.pipelined:
            return Runner(decoder, self.cache.pool)
        sampler = DeviceSampler(self._device)
        if not captured:
            return Runner(decoder, self.cache.pool, sampler=sampler)
        sizes = GraphSizes.of(self.config.batch.max_running, self.max_model_len, self.geometry.block_size)
        graphs = DecodeGraphs(decoder, self.cache.pool, self.cache.num_blocks, sizes, CudaCapture())
        started = time.monotonic()
        log.info("%d CUDA graphs of decode steps in %.1f s", graphs.capture_all(), time.monotonic() - started)
        return Runner(decoder, self.cache.pool, graphs, sampler)

    def _measured_limits(self) -> BatchConfig:
        batch = self.config.batch
        most = min(batch.max_tokens_per_step, self.max_model_len)
        chunk = measured_chunk(self._runner, self.kv, most, self.vocab_size)
        return replace(batch, prefill_chunk_tokens=chunk)

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Read the weights and make the pool. Raises `ConfigError` that says which setting or file is at fault."""
        device = _device(config.device)
        model = load_model(config.model, device, config.dtype, config.max_model_len, config.quantization)
        return cls(config, model, device)

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    def launch(self, rows: list[ScheduledRow]) -> Pending:
        """One forward pass over `rows`, and the tokens that they ask for, once they are waited for."""
        return self._runner.launch(rows)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy block contents (source, destination) as if one after the other."""
        for batch in _independent(pairs):
            ids = torch.tensor(batch, dtype=torch.int64)  # [pairs, 2]
            if self._device.type == "cuda":
                ids = ids.pin_memory().to(self._device, non_blocking=True)
            self._kernels.copy_blocks(self.cache.pool, ids[:, 0].contiguous(), ids[:, 1].contiguous())

    def compatibility(self) -> tuple[tuple[str, str], ...]:
        """What two engines must have in common before one's blocks mean anything to the other: (field, value)."""
        geometry = self.geometry
        return (
            ("model", self._fingerprint),
            ("dtype", str(geometry.dtype).removeprefix("torch.")),
            ("quantization", self.config.quantization),
            ("num_layers", str(geometry.num_layers)),
            ("num_kv_heads", str(geometry.num_kv_heads)),
            ("head_dim", str(geometry.head_dim)),
            ("block_size", str(geometry.block_size)),
            ("kv_layout", str(KV_LAYOUT_VERSION)),
        )


def _geometry(model: LoadedModel, cache: CacheConfig) -> KVGeometry:
    config = model.config
    dtype = FP8 if cache.kv_dtype == "fp8_e4m3" else model.decoder.dtype
    block_size = cache.block_size_on(model.decoder.device.type)
    return KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype)


def _forward_pass(model: LoadedModel, geometry: KVGeometry, kernels: Kernels) -> ForwardPass:
    """The native form on the CPU, where the pool's dtype is the model's; else the plain one on kernels that read it."""
    if geometry.dtype is model.decoder.dtype and model.decoder.device.type == "cpu":
        return native_decoder(model.decoder)
    return model.decoder.with_kernels(kernels)


def _flash_prefill(config: EngineConfig, model: LoadedModel, device: torch.device) -> bool:
    if config.prefill_attention == "triton":
        return False
    if device.type != "cuda" or model.decoder.dtype == torch.float32:
        here = f"{str(model.decoder.dtype).removeprefix('torch.')} on {device.type}"
        raise ConfigError(f"prefill_attention torch is for bfloat16 and float16 on cuda, not for {here}")
    return True


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted, trained = config.max_model_len, model.max_position_embeddings
    if wanted is None:
        return trained
    if wanted > trained:
        raise ConfigError(f"max_model_len {wanted} exceeds the model's max_position_embeddings, {trained}")
    return wanted


def _device(name: str) -> torch.device:
    """A device that exists; on CUDA also the current one of this thread."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not a device: use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    index = device.index or 0
    if index >= count:
        raise ConfigError(f"device {name!r} does not exist: this process sees {count} CUDA devices")
    if "expandable_segments:true" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "").lower():
        log.warning("expandable_segments is on: UCX moves such memory over TCP; unset PYTORCH_CUDA_ALLOC_CONF")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _independent(pairs: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """`pairs` cut, in order, into batches in which no destination is written twice or read."""
    batches: list[list[tuple[int, int]]] = []
    sources: set[int] = set()
    destinations: set[int] = set()
    for source, destination in pairs:
        if not batches or source in destinations or destination in sources | destinations:
            batches.append([])
            sources, destinations = set(), set()
        batches[-1].append((source, destination))
        sources.add(source)
        destinations.add(destination)
    return batches
