"""Checks before anything is started, so that what is wrong is said at once and in one line; and the launch that comes
of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.cluster.ingress.ingress import sampling_defaults
from kvbaton.cluster.launch.devices import count_gpus, resolve_device
from kvbaton.cluster.launch.ports import check_port
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.store import StoreAddress, StoreUnavailable
from kvbaton.engine.config import EngineConfig
from kvbaton.engine.model.checkpoint import check_weight_files
from kvbaton.engine.model.hf_config import check_quantization, load_model_config
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.text.tokenizer import check_tokenizer
from kvbaton.kvtransfer.config import CHECKSUM_OFF, TransferConfig
from kvbaton.settings import ConfigError


class LaunchFailed(Exception):
    """A part of the cluster did not start; the message is fit for an operator."""


@dataclass(frozen=True, slots=True)
class Preflight:
    """What the checks found out."""

    model: ModelConfig
    device: str
    num_gpus: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: what was asked for, what was found, where things are. `secret` is the cluster's."""

    config: ClusterConfig
    preflight: Preflight
    run_dir: Path
    store: StoreAddress
    secret: bytes = field(repr=False)


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
        raise ConfigError("ray.address needs --device cpu or --device cuda: this machine's GPUs say nothing of others'")
    check_checksum(config.transfer, device)
    if not joined:
        check_port(config.http)
    if config.store.redis is not None:
        check_redis(config.store.redis, config.store.prefix)
    return Preflight(model, device, num_gpus)


def check_model(config: EngineConfig) -> ModelConfig:
    """Raise `ConfigError` for what is wrong with the model's files, as far as reading their headers tells."""
    if config.model == EngineConfig().model and not config.model.exists():
        raise ConfigError(
            f"no model is named, and {config.model} does not exist: --model FOLDER or FILE.gguf, or make a tiny one "
            f"first: kvbaton make-model {config.model}"
        )
    model = load_model_config(config.model)
    sampling_defaults(config.model)
    check_tokenizer(config.model)
    check_weight_files(config.model)
    wanted, trained = config.max_model_len, model.max_position_embeddings
    if wanted is not None and wanted > trained:
        raise ConfigError(f"--max-model-len {wanted} exceeds the model's max_position_embeddings, {trained}")
    return model


def check_checksum(transfer: TransferConfig, device: str) -> None:
    """Raise `ConfigError` for checksums of blocks that never are in host memory."""
    if device == "cuda" and transfer.checksum != CHECKSUM_OFF:
        raise ConfigError(
            f"transfer.checksum: {transfer.checksum} is for engines on CPU, and here KV is on GPUs; set it to off"
        )


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
