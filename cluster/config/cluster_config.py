"""The configuration of a whole cluster, by composition; frozen. `cluster/config/config_file.py`
reads it from YAML and flags.

Every field's type says what is allowed (`Range`, `OneOf`, `NumberOr`, `ByteSize`), so one reader checks them all and
names the path of a wrong one. Derived values are return values: nothing here changes after it is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from kvbaton.engine.config import (
    CPU_BLOCK_SIZE,
    DEFAULT_CHUNK_TOKENS,
    GPU_BLOCK_SIZE,
    KV_DTYPES,
    PIPELINED,
    PREFILL_ATTENTIONS,
    QUANTIZATIONS,
    BatchConfig,
    CacheConfig,
    ConfigError,
    EngineConfig,
)
from kvbaton.kvtransfer.settings import CHECKSUM_OFF, CHECKSUMS

GIB = 1 << 30
AUTO = "auto"
GPU_STEP_TIMEOUT_S = 60.0  # the first steps may compile kernels
CPU_STEP_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds of a number."""

    low: float
    high: float = float("inf")


@dataclass(frozen=True, slots=True)
class OneOf:
    """The only strings allowed."""

    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NumberOr:
    """A whole number between inclusive bounds, or this word."""

    word: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class ByteSize:
    """A whole number of bytes, also written "512MiB" or "2 GB"; at least `low`."""

    low: int = 1


Port = Annotated[int, Range(0, 65535)]
Count = Annotated[int, Range(0, 4096)]
Positive = Annotated[int, Range(1)]
Seconds = Annotated[float, Range(0.001, 86400.0)]
Fraction = Annotated[float, Range(0.01, 1.0)]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which weights, and under which name clients ask for them (`name` None: the folder's name)."""

    path: Path = Path("models/tiny")
    name: str | None = None
    dtype: Annotated[str, OneOf(("auto", "float32", "bfloat16", "float16"))] = "auto"
    max_model_len: Positive | None = None

    @property
    def served_name(self) -> str:
        return self.name or self.path.resolve().name


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How many engines start in each role."""

    prefill: Count = 1
    decode: Count = 1
    hybrid: Count = 0

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.hybrid


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine's device and limits. `block_size` None: 32 tokens on a GPU, 16 on CPU. `threads` None: the
    machine's cores divided among its engines. `gpus` below 1 lets engines share a GPU, its memory divided alike. An
    engine with a step that takes `step_timeout_s` (None: 60 on a GPU, 300 on CPU) hangs, and is replaced.
    `prefill_chunk_tokens` auto: measured at the engine's start; None: auto on a GPU, 512 on CPU."""

    device: Annotated[str, OneOf(("auto", "cpu", "cuda"))] = "auto"
    gpus: Fraction = 1.0
    block_size: Annotated[int, Range(1, 512)] | None = None
    kv_memory: Annotated[int, ByteSize(1 << 16)] | None = None
    gpu_memory_fraction: Fraction = 0.9
    prefix_cache: bool = True
    kv_dtype: Annotated[str, OneOf(KV_DTYPES)] = "auto"
    pipelined: Annotated[str, OneOf(PIPELINED)] = "auto"
    prefill_attention: Annotated[str, OneOf(PREFILL_ATTENTIONS)] = "triton"
    quantization: Annotated[str, OneOf(QUANTIZATIONS)] = "none"
    max_tokens_per_step: Annotated[int, Range(1, 1 << 20)] = 2048
    prefill_chunk_tokens: Annotated[int | str, NumberOr(AUTO, 1, 1 << 20)] | None = None
    max_running: Annotated[int, Range(1, 65536)] = 256
    max_waiting: Annotated[int, Range(1, 1 << 20)] = 4096
    threads: Annotated[int, Range(1, 1024)] | None = None
    start_timeout_s: Seconds = 600.0
    step_timeout_s: Seconds | None = None


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """KV transfer between engines; see `kvtransfer.settings`. `ucx_tls` goes to UCX as UCX_TLS. `checksum` is for
    engines on CPU."""

    ucx_tls: str = "all"
    lease_s: Seconds = 10.0
    connect_s: Seconds = 5.0
    drain_s: Seconds = 2.0
    send_window: Annotated[int, Range(1, 4096)] = 8
    bandwidth_floor: Annotated[int, ByteSize(0)] = 0
    checksum: Annotated[str, OneOf(CHECKSUMS)] = CHECKSUM_OFF


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """Placement: prompts with fewer new tokens than `local_prefill_tokens` are prefilled on the decode engine."""

    local_prefill_tokens: Annotated[int, Range(0, 1 << 20)] = 32
    max_resumes: Annotated[int, Range(0, 100)] = 3


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The public endpoint. `replicas` are ingress processes behind one port. No request takes longer than
    `request_timeout_s`, whatever limit it brings."""

    host: str = "127.0.0.1"
    port: Port = 8000
    replicas: Annotated[int, Range(1, 64)] = 1
    max_ongoing_requests: Annotated[int, Range(1, 1 << 20)] = 4096
    max_body: Annotated[int, ByteSize(1024)] = 16 << 20
    shutdown_timeout_s: Seconds = 20.0
    request_timeout_s: Seconds = 3600.0


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """The shared state. `redis` None starts an embedded server on the loopback interface."""

    redis: str | None = None
    prefix: str = "kvbaton"


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    """Secrets. `cluster_secret` None: a new one for each launch. `api_keys` empty: no key asked."""

    cluster_secret: str | None = field(default=None, repr=False)
    api_keys: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class RaySettings:
    """`address` None starts a private Ray cluster that ends with the launcher; else the one there is joined."""

    address: str | None = None
    object_store_memory: Annotated[int, ByteSize(75 << 20)] = 96 << 20
    log_level: Annotated[str, OneOf(("debug", "info", "warning", "error"))] = "warning"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that `kvbaton serve` needs to know."""

    model: ModelSettings = ModelSettings()
    pools: PoolSettings = PoolSettings()
    engine: EngineSettings = EngineSettings()
    transfer: TransferSettings = TransferSettings()
    router: RouterSettings = RouterSettings()
    http: HttpSettings = HttpSettings()
    store: StoreSettings = StoreSettings()
    security: SecuritySettings = SecuritySettings()
    ray: RaySettings = RaySettings()

    def check(self) -> None:
        """Raise `ConfigError` for settings that are each fine and cannot work together."""
        pools = self.pools
        if pools.total == 0:
            raise ConfigError("pools: no engine at all; set --prefill and --decode, or --hybrid")
        if pools.hybrid == 0 and (pools.prefill == 0 or pools.decode == 0):
            missing = "prefill" if pools.prefill == 0 else "decode"
            raise ConfigError(f"pools: no engine can {missing}; set --{missing} 1, or --hybrid 1")
        if not all(key.strip() for key in self.security.api_keys):
            raise ConfigError("security.api_keys: a key is empty")
        chunk, most = self.engine.prefill_chunk_tokens, self.engine.max_tokens_per_step
        if isinstance(chunk, int) and chunk > most:
            raise ConfigError(f"engine.prefill_chunk_tokens ({chunk}) exceeds engine.max_tokens_per_step ({most})")

    def step_timeout_s(self, device: str) -> float:
        """How long a step may take on a resolved device."""
        default = GPU_STEP_TIMEOUT_S if device == "cuda" else CPU_STEP_TIMEOUT_S
        return self.engine.step_timeout_s or default

    def engine_config(self, device: str, threads: int | None) -> EngineConfig:
        """What one engine gets. `device` is resolved: "cpu" or "cuda"."""
        engine = self.engine
        default_block_size = GPU_BLOCK_SIZE if device == "cuda" else CPU_BLOCK_SIZE
        default_chunk = min(DEFAULT_CHUNK_TOKENS, engine.max_tokens_per_step)
        chunk = engine.prefill_chunk_tokens or (AUTO if device == "cuda" else default_chunk)
        return EngineConfig(
            model=self.model.path.resolve(),
            device=device,
            dtype=self.model.dtype,
            max_model_len=self.model.max_model_len,
            threads=engine.threads or threads,
            cache=CacheConfig(
                block_size=engine.block_size or default_block_size,
                kv_memory_bytes=engine.kv_memory,
                gpu_memory_fraction=engine.gpu_memory_fraction * engine.gpus,
                prefix_cache=engine.prefix_cache,
                kv_dtype=engine.kv_dtype,
            ),
            batch=BatchConfig(
                max_tokens_per_step=engine.max_tokens_per_step,
                prefill_chunk_tokens=chunk if isinstance(chunk, int) else default_chunk,
                max_running=engine.max_running,
                max_waiting=engine.max_waiting,
            ),
            measure_chunk=chunk == AUTO,
            prefill_attention=engine.prefill_attention,
            pipelined=engine.pipelined,
            quantization=engine.quantization,
        )
