"""What a launch refuses before it starts anything, and what it says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbaton.cluster.config.cluster_config import (
    ClusterConfig,
    HostingConfig,
    HttpConfig,
    PoolsConfig,
    RayConfig,
    StoreConfig,
)
from kvbaton.cluster.launch import preflight
from kvbaton.cluster.launch.devices import resolve_device, threads_per_engine
from kvbaton.cluster.launch.preflight import check_checksum, check_launch, check_redis
from kvbaton.cluster.store.valkey import EmbeddedValkey
from kvbaton.engine.config import EngineConfig
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.settings import ConfigError

TinyModel = Callable[[str], Path]


def refused(check: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        check()
    return str(caught.value)


def gpu_config(pools: PoolsConfig, device: str = "auto", gpus: float = 1.0) -> ClusterConfig:
    return ClusterConfig(pools=pools, hosting=HostingConfig(device=device, gpus=gpus))


def test_a_redis_that_is_down_is_named() -> None:
    message = refused(lambda: check_redis("redis://:secret@127.0.0.1:1/0", "kvbaton"))
    assert "127.0.0.1:1" in message
    assert "--redis" in message
    assert "secret" not in message


@pytest.mark.redis
def test_a_redis_that_answers_passes() -> None:
    server = EmbeddedValkey()
    check_redis(server.start(), "kvbaton")
    server.stop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "rwkv"}'), "config.json"),
        (lambda folder: (folder / "generation_config.json").write_text('{"top_k": "all"}'), "top_k must be an integer"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"), "save_pretrained"),
    ],
)
def test_a_damaged_model_folder_is_named(
    tiny_model: TinyModel, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((tiny_model("llama") / name).read_bytes())
    spoil(folder)
    config = ClusterConfig(engine=EngineConfig(folder))
    assert message in refused(lambda: check_launch(config))


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    config = ClusterConfig(engine=EngineConfig(tmp_path / "none"))
    assert str(tmp_path / "none") in refused(lambda: check_launch(config))


def test_no_model_at_all_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(lambda: check_launch(ClusterConfig()))
    assert "--model FOLDER" in message
    assert "kvbaton make-model models/tiny" in message


def test_a_length_past_the_models_own_is_refused_before_anything_starts(tiny_model: TinyModel) -> None:
    config = ClusterConfig(engine=EngineConfig(tiny_model("llama"), max_model_len=10**6))
    assert "--max-model-len 1000000 exceeds" in refused(lambda: check_launch(config))


def test_a_launch_that_can_work_passes(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    config = ClusterConfig(engine=EngineConfig(tiny_model("llama")), http=HttpConfig(port=0))
    found = check_launch(config)
    assert (found.device, found.num_gpus) == ("cpu", 0)
    assert found.model.num_layers == 4


def test_checksums_of_blocks_in_gpu_memory_are_refused_before_anything_starts() -> None:
    message = refused(lambda: check_checksum(TransferConfig(checksum="xxh3"), "cuda"))
    assert message.startswith("transfer.checksum: xxh3 is for engines on CPU")
    check_checksum(TransferConfig(checksum="xxh3"), "cpu")
    check_checksum(TransferConfig(), "cuda")


@pytest.mark.redis
def test_joining_a_ray_cluster_needs_a_redis_that_others_can_reach(tiny_model: TinyModel) -> None:
    engine = EngineConfig(tiny_model("llama"))
    joined = RayConfig(address="10.0.0.1:6379")
    assert "--redis" in refused(lambda: check_launch(ClusterConfig(engine=engine, ray=joined)))
    server = EmbeddedValkey()
    store = StoreConfig(redis=server.start())
    assert "--device" in refused(lambda: check_launch(ClusterConfig(engine=engine, ray=joined, store=store)))
    server.stop()


@pytest.mark.parametrize(
    ("config", "num_gpus", "device"),
    [
        (gpu_config(PoolsConfig(1, 1)), 0, "cpu"),
        (gpu_config(PoolsConfig(1, 1)), 2, "cuda"),
        (gpu_config(PoolsConfig(1, 1), device="cpu"), 8, "cpu"),
        (gpu_config(PoolsConfig(1, 1), gpus=0.5), 1, "cuda"),
    ],
)
def test_device(config: ClusterConfig, num_gpus: int, device: str) -> None:
    assert resolve_device(config, num_gpus) == device


def test_fewer_gpus_than_engines_says_what_to_do() -> None:
    message = refused(lambda: resolve_device(gpu_config(PoolsConfig(2, 1)), 1))
    assert message.startswith("3 engines (2 prefill, 1 decode) need GPUs, one each, and there is 1 GPU.")
    assert "--prefill 0 --decode 0 --hybrid 1" in message
    assert "--gpus-per-engine 0.33" in message
    assert "--device cpu" in message
    assert resolve_device(gpu_config(PoolsConfig(2, 1), gpus=0.33), 1) == "cuda"  # the advice works


def test_cuda_without_a_gpu_is_refused() -> None:
    assert "--device cpu" in refused(lambda: resolve_device(gpu_config(PoolsConfig(1, 1), device="cuda"), 0))


def test_cpu_engines_share_the_cores() -> None:
    assert threads_per_engine(gpu_config(PoolsConfig(1, 1)), "cuda") is None
    cores = len(os.sched_getaffinity(0))
    assert threads_per_engine(gpu_config(PoolsConfig(1, 0, 0)), "cpu") == cores
    assert threads_per_engine(gpu_config(PoolsConfig(500, 500)), "cpu") == 1
