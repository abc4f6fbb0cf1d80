"""The pool's bytes: a block's view must be exactly the block, for every dtype."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from kvbaton.engine.kv.kv_cache import KVCache, KVGeometry

CPU = torch.device("cpu")


def geometry(dtype: torch.dtype = torch.float32) -> KVGeometry:
    return KVGeometry(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=dtype)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_its_bytes(dtype: torch.dtype) -> None:
    """Guards the hand-off: wrong strides or sizes would send parts of other blocks."""
    cache = KVCache(geometry(dtype), 5, CPU)
    cache.pool.copy_(torch.randn(cache.pool.shape, generator=torch.Generator().manual_seed(0)))
    assert cache.pool.shape == (5, 3, 2, 2, 4, 8)
    assert cache.block_bytes == 3 * 2 * 2 * 4 * 8 * dtype.itemsize
    for block_id in range(5):
        view = memoryview(cache.block(block_id))
        assert (view.nbytes, view.contiguous, view.readonly) == (cache.block_bytes, True, False)
        assert bytes(view) == bytes(cache.pool[block_id].clone().view(torch.uint8).numpy())


def test_writing_a_block_writes_the_pool_and_nothing_else() -> None:
    """Guards landing KV: no copy in between, and no neighbour touched."""
    cache = KVCache(geometry(), 3, CPU)
    cache.block(1)[:] = np.frombuffer(np.full(cache.block_bytes // 4, 2.5, np.float32), np.uint8)
    assert (cache.pool[1] == 2.5).all()
    assert not cache.pool[0].any()
    assert not cache.pool[2].any()


def test_a_fresh_pool_is_zero_and_costs_nothing() -> None:
    """Guards start-up and memory: pages of a GiB that no block has used yet must not exist."""
    big = KVGeometry(num_layers=64, num_kv_heads=8, head_dim=128, block_size=64, dtype=torch.bfloat16)
    assert big.block_bytes == 16 << 20
    before = resident_bytes()
    cache = KVCache(big, 64, CPU)
    assert not cache.block(63).any()
    assert cache.block(63).ctypes.data % 4096 == 0
    assert resident_bytes() - before < 128 << 20


@pytest.mark.parametrize("block_id", [-1, 3])
def test_unknown_blocks_are_refused(block_id: int) -> None:
    """Guards against -1 silently meaning the last block."""
    with pytest.raises(IndexError, match=f"block {block_id} does not exist in a pool of 3"):
        KVCache(geometry(), 3, CPU).block(block_id)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_block_on_a_gpu_is_device_memory() -> None:
    """Guards zero copy: the transport must be given device addresses."""
    cache = KVCache(geometry(torch.bfloat16), 3, torch.device("cuda"))
    interface = cache.block(1).__cuda_array_interface__
    assert interface["shape"] == (cache.block_bytes,)
    assert interface["data"][0] == cache.pool.data_ptr() + cache.block_bytes
