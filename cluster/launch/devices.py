"""Which devices a launch can use, found without importing torch."""

from __future__ import annotations

import ctypes
import os

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.settings import ConfigError


def count_gpus() -> int:
    """GPUs that CUDA sees, CUDA_VISIBLE_DEVICES respected; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def resolve_device(config: ClusterConfig, num_gpus: int) -> str:
    """ "cpu" or "cuda"; raises `ConfigError` when the machine does not have what the configuration asks for."""
    wanted = config.hosting.device
    if wanted == "cpu" or (wanted == "auto" and num_gpus == 0):
        return "cpu"
    if num_gpus == 0:
        raise ConfigError("engine.device is cuda, and CUDA finds no GPU here; check nvidia-smi, or use --device cpu")
    needed = config.pools.total * config.hosting.gpus
    if needed > num_gpus:
        raise ConfigError(_too_few(config, num_gpus))
    return "cuda"


def _too_few(config: ClusterConfig, num_gpus: int) -> str:
    pools, total = config.pools, config.pools.total
    named = [f"{count} {name}" for name in ("prefill", "decode", "hybrid") if (count := getattr(pools, name))]
    each = "one each" if config.hosting.gpus == 1.0 else f"{config.hosting.gpus:g} each"
    share = int(100 * num_gpus / total) / 100
    return (
        f"{total} engines ({', '.join(named)}) need GPUs, {each}, and there {_are(num_gpus)}. Either\n"
        f"  start fewer engines: --prefill 0 --decode 0 --hybrid {num_gpus} does both on each GPU, or\n"
        f"  let engines share a GPU and its memory: --gpus-per-engine {share:g}, or\n"
        f"  run on the CPU: --device cpu"
    )


def _are(count: int) -> str:
    return "is 1 GPU" if count == 1 else f"are {count} GPUs"


def threads_per_engine(config: ClusterConfig, device: str) -> int | None:
    """The machine's cores divided among its CPU engines; None leaves torch's default on a GPU."""
    if device != "cpu":
        return None
    return max(1, count_cores() // max(1, config.pools.total))
