"""How many KV blocks an engine gets, from a configured size or from the memory that is free."""

from __future__ import annotations

import logging
import os

import torch

from kvbaton.engine.config import MAX_REGENERATED, BatchConfig, CacheConfig
from kvbaton.engine.kv.kv_cache import KVGeometry
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.settings import ConfigError

log = logging.getLogger(__name__)

CPU_DEFAULT_BYTES = 1 << 30
CPU_SHARE = 0.5  # of the memory that is free now, at most
MAX_DEFAULT_BLOCKS = 1 << 16  # a tiny model's blocks are so small that more would only cost bookkeeping
MAX_ATTENTION_SPLITS = 64  # `kernels.triton_decode`'s, which only imports where triton is
SLACK = 1.25  # what the allocator loses to fragments
MIN_BLOCKS = 2  # one to hold a sequence's tokens, one to copy to


def num_blocks_for(cache: CacheConfig, geometry: KVGeometry, device: torch.device, workspace_bytes: int = 0) -> int:
    """`workspace_bytes` of the device's memory are left for the steps themselves, where the pool's size is measured.

    Raises `ConfigError` where the memory is not even enough for two blocks.
    """
    if cache.kv_memory_bytes is not None:
        size = cache.kv_memory_bytes
    elif device.type == "cuda":
        size = _cuda_bytes(cache, device, workspace_bytes)
    else:
        size = min(_cpu_bytes(), MAX_DEFAULT_BLOCKS * geometry.block_bytes)
    count = size // geometry.block_bytes
    if count < MIN_BLOCKS:
        raise ConfigError(
            f"KV memory of {size} bytes is less than {MIN_BLOCKS} blocks of {geometry.block_bytes} bytes "
            f"({geometry.block_size} tokens each): give more KV memory or a smaller block size"
        )
    return count


def usable_model_len(max_model_len: int, num_blocks: int, block_size: int) -> int:
    """`max_model_len`, or the whole pool where that is less: a longer sequence could never run."""
    room = num_blocks * block_size
    if room < max_model_len:
        log.warning("KV pool of %d tokens is smaller than max_model_len %d: using %d", room, max_model_len, room)
    return min(max_model_len, room)


def step_workspace_bytes(model: ModelConfig, batch: BatchConfig, itemsize: int, gathered_tokens: int = 0) -> int:
    """Bytes that the largest step needs beside weights and pool, once more for the decode graphs; an upper bound.

    Activations of a layer for every token; logits of every running row, in the model's dtype and in float32, for
    this step and the one before; the parts of split attention; K and V of a layer for `gathered_tokens`.
    """
    tokens, decodes = max(batch.max_tokens_per_step, batch.max_running), batch.max_running + MAX_REGENERATED
    inner = max(model.intermediate_size, model.moe.intermediate_size * model.moe.top_k if model.moe else 0)
    layer = 4 * model.hidden_size + 3 * model.q_size + 2 * model.kv_size + 3 * inner
    logits = batch.max_running * model.vocab_size * (itemsize + 8)
    parts = decodes * model.num_heads * MAX_ATTENTION_SPLITS * (model.head_dim + 2) * 4
    gathered = 2 * gathered_tokens * model.kv_size * itemsize
    return int(SLACK * (tokens * layer * itemsize + logits + 2 * parts + gathered))


def _cuda_bytes(cache: CacheConfig, device: torch.device, workspace_bytes: int) -> int:
    """Measured after the weights are loaded."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, min(int(free * cache.gpu_memory_fraction), free - workspace_bytes))


def _cpu_bytes() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(CPU_DEFAULT_BYTES, int(free * CPU_SHARE))
