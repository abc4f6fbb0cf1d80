"""Checks before anything is started, so that what is wrong is said at once and in one line."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Container
from dataclasses import dataclass

import psutil

from kvbaton.cluster.config.cluster_config import ClusterConfig, HttpConfig
from kvbaton.cluster.launch.devices import count_gpus, resolve_device
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.store import StoreUnavailable
from kvbaton.engine.config import ConfigError, EngineConfig
from kvbaton.engine.model.hf_config import check_quantization, load_model_config
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.weight_files import check_weight_files
from kvbaton.engine.text.tokenizer import check_tokenizer
from kvbaton.kvtransfer.settings import CHECKSUM_OFF, TransferSettings


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found out."""

    model: ModelConfig
    device: str
    num_gpus: int


def check_launch(config: ClusterConfig) -> Preflight:
    """Raises `ConfigError` for the first thing that cannot work."""
    model = check_model(config.engine)
    check_quantization(model, config.engine.quantization)
    joined = config.ray.address is not None
    if joined and config.store.redis is None:
        raise ConfigError(
            "ray.address needs store.redis (--redis URL): the embedded server listens on this machine's loopback only"
        )
    num_gpus = 0 if config.hosting.device == "cpu" or joined else count_gpus()
    device = config.hosting.device if joined else resolve_device(config, num_gpus)
    if device == "auto":
        raise ConfigError("ray.address needs --device cpu or --device cuda: this machine's GPUs say nothing of others")
    check_checksum(config.transfer, device)
    if not joined:
        check_port(config.http)
    if config.store.redis is not None:
        check_redis(config.store.redis, config.store.prefix)
    return Preflight(model, device, num_gpus)


def check_model(config: EngineConfig) -> ModelConfig:
    """Raise `ConfigError` for what is wrong with the model's files, as far as small reads tell."""
    if config.model == EngineConfig().model and not config.model.exists():
        raise ConfigError(
            f"no model is named, and {config.model} does not exist: --model FOLDER, or make a tiny one first: "
            f"kvbaton make-model {config.model}"
        )
    model = load_model_config(config.model)
    check_tokenizer(config.model)
    check_weight_files(config.model)
    wanted, trained = config.max_model_len, model.max_position_embeddings
    if wanted is not None and wanted > trained:
        raise ConfigError(f"--max-model-len {wanted} exceeds the model's max_position_embeddings, {trained}")
    return model


def check_checksum(transfer: TransferSettings, device: str) -> None:
    """Raise `ConfigError` for checksums of blocks that never are in host memory."""
    if device == "cuda" and transfer.checksum != CHECKSUM_OFF:
        raise ConfigError(
            f"transfer.checksum: {transfer.checksum} is for engines on CPU, and here KV is on GPUs; set it to off"
        )


def check_port(http: HttpConfig, ours: Container[int | None] = ()) -> None:
    """Raise `ConfigError` when the endpoint's port cannot be opened, naming who has it; processes in `ours` may."""
    try:
        family = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise ConfigError(f"http.host: '{http.host}' is not an address of this machine: {error.strerror}") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except PermissionError:
            raise ConfigError(f"port {http.port} needs more rights than this user has; choose one above 1023") from None
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on {http.host}:{http.port}: {error.strerror}") from None
            pid = _listening(http.port)
            if pid in ours:
                return
            who, other = _name(pid), other_port(http)
            raise ConfigError(
                f"port {http.port} on {http.host} is in use by {who}; stop it, or choose another: --port {other} "
                f"(make serve PORT={other})"
            ) from None


def _listening(port: int) -> int | None:
    """The process that listens on a port, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
            return connection.pid
    return None


def _name(pid: int | None) -> str:
    if pid is None:
        return "another process"
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"pid {pid}"


def other_port(http: HttpConfig) -> int:
    """A port near the wanted one that is free at this moment."""
    for port in range(http.port + 1, min(http.port + 50, 65536)):
        with socket.socket() as probe:
            try:
                probe.bind((http.host, port))
            except OSError:
                continue
            return port
    return 0


def check_redis(url: str, namespace: str) -> None:
    """Raise `ConfigError` when the server does not answer."""

    async def ask() -> None:
        store = await RedisStore.open(url, namespace)
        await store.close()

    try:
        asyncio.run(ask())
    except StoreUnavailable as error:
        said = str(error).rstrip(".")
        raise ConfigError(
            f"store.redis: {said}. Start it, correct --redis, or leave it out to have an embedded server started"
        ) from None
