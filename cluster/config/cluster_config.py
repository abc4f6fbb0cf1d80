"""The configuration of a whole cluster: its components' own classes, and those of what only the cluster has; frozen.

Each setting stands in the class of the component that uses it (see `kvbaton.settings`) and says there where in the file
operators find it. `cluster/config/config_file.py` reads the file and the flags. Derived values are return values.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from kvbaton.cluster.client.settings import ClientConfig
from kvbaton.cluster.http.limits import HttpLimits
from kvbaton.engine.config import EngineConfig
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.router.placement import RouterConfig
from kvbaton.settings import BYTES, ConfigError, Seconds, Setting, check

GPU_STEP_TIMEOUT_S = 60.0  # the first steps may compile kernels
CPU_STEP_TIMEOUT_S = 300.0
NumEngines = Annotated[int, Interval(ge=0, le=4096)]

SECTIONS = {
    "model": "which weights, and under which name clients ask for them",
    "pools": "how many engines start in each role",
    "engine": "one engine: its device, its memory, its steps",
    "transfer": "KV transfer between engines",
    "router": "where a request runs",
    "http": "the public endpoint",
    "store": "the state that engines and ingresses share",
    "security": "secrets; they are not printed",
    "ray": "the Ray cluster that the engines run in",
}


@dataclass(frozen=True, slots=True)
class PoolsConfig:
    """How many engines start in each role."""

    prefill: Annotated[NumEngines, Setting("pools.prefill", "engines that prefill")] = 1
    decode: Annotated[NumEngines, Setting("pools.decode", "engines that decode")] = 1
    hybrid: Annotated[NumEngines, Setting("pools.hybrid", "engines that do both, chunked prefill beside decode")] = 0

    def __post_init__(self) -> None:
        check(self)

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.hybrid


@dataclass(frozen=True, slots=True)
class HostingConfig:
    """What the cluster gives an engine, and how long it waits for one."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Setting("engine.device", "auto: cuda where there is a GPU, one engine each, else cpu"),
    ] = "auto"
    gpus: Annotated[
        float,
        Interval(ge=0.01, le=1.0),
        Setting("engine.gpus", "GPUs of one engine; below 1, engines share a GPU, its memory divided alike"),
    ] = 1.0
    start_timeout_s: Annotated[
        Seconds, Setting("engine.start_timeout_s", "until an engine that does not come up counts as failed")
    ] = 600.0
    step_timeout_s: Annotated[
        Seconds | None,
        Setting(
            "engine.step_timeout_s",
            "an engine with a step that takes longer hangs, and is replaced; raise it for large models on few cores",
            unset="60 on a GPU, 300 on CPU",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)

    def step_timeout_on(self, device: str) -> float:
        """Seconds that a step may take on a resolved device."""
        return self.step_timeout_s or (GPU_STEP_TIMEOUT_S if device == "cuda" else CPU_STEP_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """The public endpoint."""

    model_name: Annotated[
        str | None, Setting("model.name", "what clients pass as model", unset="the folder's or file's name")
    ] = None
    host: Annotated[
        str, Setting("http.host", "address of the endpoint; 0.0.0.0 serves other machines: set security.api_keys then")
    ] = "127.0.0.1"
    port: Annotated[int, Interval(ge=0, le=65535), Setting("http.port", "port of the endpoint; 0 takes a free one")] = (
        8000
    )
    replicas: Annotated[int, Interval(ge=1, le=64), Setting("http.replicas", "ingress processes behind the port")] = 1
    max_ongoing_requests: Annotated[
        int, Interval(ge=1, le=1 << 20), Setting("http.max_ongoing_requests", "calls in progress per ingress process")
    ] = 4096
    limits: HttpLimits = field(default_factory=HttpLimits)
    request_timeout_s: Annotated[
        Seconds, Setting("http.request_timeout_s", "no request takes longer, whatever limit it brings")
    ] = 3600.0
    shutdown_timeout_s: Annotated[
        Seconds,
        Setting("http.shutdown_timeout_s", "for responses in progress when the endpoint goes down"),
    ] = 20.0

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """The shared state."""

    redis: Annotated[
        str | None,
        Setting(
            "store.redis",
            "URL of a Redis or Valkey, such as redis://127.0.0.1:6379/0",
            unset="one on the loopback interface that ends with the cluster",
        ),
    ] = None
    prefix: Annotated[str, Setting("store.prefix", "of all keys, so that clusters can share a Redis")] = "kvbaton"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """Secrets."""

    api_keys: Annotated[
        tuple[str, ...], Setting("security.api_keys", "bearer keys that clients may bring; none: no key is asked")
    ] = field(default=(), repr=False)
    cluster_secret: Annotated[
        str | None,
        Setting(
            "security.cluster_secret",
            "authenticates sessions and KV transfer between parts",
            unset="a new one for each launch",
        ),
    ] = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class RayConfig:
    """The Ray cluster."""

    address: Annotated[
        str | None,
        Setting(
            "ray.address",
            "Ray cluster to join, such as 10.0.0.1:6379; needs store.redis and engine.device",
            unset="a private one that ends with the launcher",
        ),
    ] = None
    object_store_memory: Annotated[
        int,
        BYTES,
        Ge(75 << 20),
        Setting("ray.object_store_memory", "of the private cluster; KV never goes through it"),
    ] = 96 << 20
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Setting("ray.log_level", "what every process logs")
    ] = "warning"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that `kvbaton serve` needs to know."""

    pools: PoolsConfig = PoolsConfig()
    hosting: HostingConfig = HostingConfig()
    engine: EngineConfig = field(default_factory=EngineConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    client: ClientConfig = field(default_factory=ClientConfig)
    http: HttpConfig = HttpConfig()
    store: StoreConfig = StoreConfig()
    security: SecurityConfig = SecurityConfig()
    ray: RayConfig = RayConfig()

    @property
    def model_id(self) -> str:
        """What clients pass as model."""
        model = self.engine.model.resolve()
        return self.http.model_name or (model.stem if model.suffix == ".gguf" else model.name)

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
        if any(key != key.strip() for key in self.security.api_keys):
            raise ConfigError("security.api_keys: a key begins or ends with a blank, which no client can send")
        chunk, most = self.engine.batch.prefill_chunk_tokens, self.engine.batch.max_tokens_per_step
        if isinstance(chunk, int) and chunk > most:
            raise ConfigError(f"engine.prefill_chunk_tokens ({chunk}) exceeds engine.max_tokens_per_step ({most})")

    def engine_config(self, device: str, threads: int | None) -> EngineConfig:
        """What one engine gets on a resolved device, "cpu" or "cuda". `threads`: where no number is set."""
        engine, cache, batch = self.engine, self.engine.cache, self.engine.batch
        measured = batch.prefill_chunk_tokens is None and device == "cuda"
        return replace(
            engine,
            model=engine.model.resolve(),
            device=device,
            threads=engine.threads or threads,
            cache=replace(cache, gpu_memory_fraction=cache.gpu_memory_fraction * self.hosting.gpus),
            batch=replace(batch, prefill_chunk_tokens="auto") if measured else batch,
        )
