"""Configuration of one engine, by composition; frozen, checked once when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

KV_DTYPES = ("auto", "fp8_e4m3")
PIPELINED = ("auto", "on", "off")
QUANTIZATIONS = ("none", "int8")
PREFILL_ATTENTIONS = ("triton", "torch")
GPU_BLOCK_SIZE = 32  # tokens a KV block where nothing is said; larger ones leave more slots held and unused
CPU_BLOCK_SIZE = 16
DEFAULT_CHUNK_TOKENS = 512


class ConfigError(ValueError):
    """A setting that cannot work; the message says which one and what to do."""


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """`kv_memory_bytes` None = measured: free GPU memory times `gpu_memory_fraction` after the weights, 1 GiB on CPU.
    `kv_dtype` auto is the model's own dtype; fp8_e4m3 halves a 16-bit model's KV memory and the reads of attention."""

    block_size: int = CPU_BLOCK_SIZE
    kv_memory_bytes: int | None = None
    gpu_memory_fraction: float = 0.9
    prefix_cache: bool = True
    kv_dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Limits of one step. `max_tokens_per_step` is the token budget shared by decode rows and prefill chunks.

    No prompt is begun for another engine while `max_handoffs` are open or would hold more than `max_held_fraction` of
    the pool: one that no peer takes may fill this much and no more.
    """

    max_tokens_per_step: int = 2048
    prefill_chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    max_running: int = 256
    max_waiting: int = 4096
    max_handoffs: int = 1024
    max_held_fraction: float = 0.75


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: which weights on which device, and how it batches. `threads` None leaves torch's default.
    `prefill_attention` torch computes prompt chunks with torch's flash attention on CUDA, in 16 bits.
    `measure_chunk`: `batch.prefill_chunk_tokens` is replaced by what the engine measures at its start.
    `cuda_graphs` False runs decode steps operator by operator on CUDA too. `pipelined`: whether a step is scheduled
    while the one before runs; auto is where decode steps are graphs. `quantization` int8 holds the layers' matrices and
    the output projection as 8-bit integers; activations and KV stay as they are."""

    model: Path
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    threads: int | None = None
    cache: CacheConfig = CacheConfig()
    batch: BatchConfig = BatchConfig()
    measure_chunk: bool = False
    prefill_attention: str = "triton"
    cuda_graphs: bool = True
    pipelined: str = "auto"
    quantization: str = "none"
