"""Configuration of one engine, by composition; frozen, checked when it is built (see `kvbaton.settings`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Interval

from kvbaton.settings import BYTES, Count, Setting, check

Quantization = Literal["none", "int8"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
GPU_BLOCK_SIZE = 32  # larger ones leave more slots held and unused
CPU_BLOCK_SIZE = 16
DEFAULT_CHUNK_TOKENS = 512
MAX_REGENERATED = 256  # generated tokens that a step computes again: each is a decode piece, with scratch of its own


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV pool: how large it is, and what of it is kept."""

    block_size: Annotated[
        int | None,
        Interval(ge=1, le=512),
        Setting("engine.block_size", "tokens a KV block", unset="32 on a GPU, 16 on CPU"),
    ] = None
    kv_memory_bytes: Annotated[
        int | None,
        BYTES,
        Ge(1 << 16),
        Setting(
            "engine.kv_memory",
            "KV pool of one engine",
            unset="free GPU memory times gpu_memory_fraction; 1 GiB at most on CPU",
        ),
    ] = None
    gpu_memory_fraction: Annotated[
        float,
        Interval(ge=0.0001, le=1.0),
        Setting("engine.gpu_memory_fraction", "of the GPU memory that is free after the weights, for the KV pool"),
    ] = 0.9
    prefix_cache: Annotated[
        bool, Setting("engine.prefix_cache", "keep finished blocks for prompts that begin alike")
    ] = True
    kv_dtype: Annotated[
        Literal["auto", "fp8_e4m3"],
        Setting(
            "engine.kv_dtype",
            "auto: the model's dtype; fp8_e4m3: 8-bit KV, half of bfloat16's memory, at a cost in accuracy",
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        check(self)

    def block_size_on(self, device_type: str) -> int:
        """Tokens a block on "cpu" or "cuda"."""
        return self.block_size or (GPU_BLOCK_SIZE if device_type == "cuda" else CPU_BLOCK_SIZE)


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """Limits of one step, and of what waits for one.

    No prompt is begun for another engine while `max_handoffs` are open or would hold more than `max_held_fraction` of
    the pool: one that no peer takes may fill this much and no more.
    """

    max_tokens_per_step: Annotated[
        int,
        Interval(ge=1, le=1 << 20),
        Setting("engine.max_tokens_per_step", "decode rows and prefill chunks together"),
    ] = 2048
    prefill_chunk_tokens: Annotated[
        int | Literal["auto"] | None,
        Interval(ge=1, le=1 << 20),
        Setting(
            "engine.prefill_chunk_tokens",
            "the longest chunk that running streams wait for; auto: each engine times itself at its start, for 10 s at "
            "most, and takes the shortest chunk that computes at 95 % of the best rate",
            unset="auto on a GPU, 512 on CPU",
        ),
    ] = None
    max_running: Annotated[
        int, Interval(ge=1, le=65536), Setting("engine.max_running", "sequences that decode at once")
    ] = 256
    max_waiting: Annotated[
        int,
        Interval(ge=1, le=1 << 20),
        Setting("engine.max_waiting", "requests beyond those, before the engine refuses"),
    ] = 4096
    max_handoffs: Count = 1024
    max_held_fraction: Annotated[float, Interval(ge=0.0, le=1.0)] = 0.75

    def __post_init__(self) -> None:
        check(self)

    @property
    def chunk_tokens(self) -> int:
        """The longest prefill chunk, where none has been measured."""
        chunk = self.prefill_chunk_tokens
        return chunk if isinstance(chunk, int) else min(DEFAULT_CHUNK_TOKENS, self.max_tokens_per_step)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: which weights on which device, and how it batches. `device` is cpu, cuda or cuda:N. `threads` None
    leaves torch's default. `cuda_graphs` False runs decode steps operator by operator on CUDA too."""

    model: Annotated[Path, Setting("model.path", "Hugging Face folder with safetensors, or a GGUF file")] = Path(
        "models/tiny"
    )
    device: str = "cpu"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], Setting("model.dtype", "auto: the checkpoint's")
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        Ge(2),
        Setting("model.max_model_len", "tokens of prompt and completion together", unset="what the model allows"),
    ] = None
    threads: Annotated[
        int | None,
        Interval(ge=1, le=1024),
        Setting("engine.threads", "CPU threads of one engine", unset="the cores divided among the engines"),
    ] = None
    cache: CacheConfig = CacheConfig()
    batch: BatchConfig = BatchConfig()
    prefill_attention: Annotated[
        Literal["triton", "torch"],
        Setting(
            "engine.prefill_attention",
            "torch: prompt chunks attend by torch's own flash attention, over K and V gathered from their blocks; on "
            "GPUs, in bfloat16 and float16",
        ),
    ] = "triton"
    cuda_graphs: bool = True
    pipelined: Annotated[
        Literal["auto", "on", "off"],
        Setting(
            "engine.pipelined",
            "schedule a step while the one before runs, so that the device does not wait for the host; auto: where "
            "decode steps are CUDA graphs",
        ),
    ] = "auto"
    quantization: Annotated[
        Quantization,
        Setting(
            "engine.quantization",
            "int8: the layers' matrices and the output projection as 8-bit integers, made when the weights are read; "
            "the same on all engines",
        ),
    ] = "none"

    def __post_init__(self) -> None:
        check(self)
