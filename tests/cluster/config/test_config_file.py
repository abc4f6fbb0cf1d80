"""Strict configuration: what is wrong is named, with the place it stands and the nearest right thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbaton.cluster.config.cluster_config import ClusterConfig, PoolsConfig
from kvbaton.cluster.config.config_file import Override, load_config
from kvbaton.settings import ConfigError


def load(tmp_path: Path, text: str, *overrides: Override) -> ClusterConfig:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_config(path, overrides)


FULL = """
model:
  path: /models/qwen
  name: qwen
  dtype: bfloat16
pools: {prefill: 2, decode: 3}
engine:
  block_size: 32
  kv_memory: 1.5GiB
  prefix_cache: false
http:
  host: 0.0.0.0
  port: 8001
store:
  redis: redis://cache:6379/2
security:
  api_keys: [a, b]
transfer:
  lease_s: 5
"""


def test_a_model_is_called_as_its_folder_or_file(tmp_path: Path) -> None:
    names = {
        path: load(tmp_path, f"model: {{path: {path}}}").model_id for path in ("/models/Qwen3-8B", "/m/S-1.Q4_1.gguf")
    }
    assert names == {"/models/Qwen3-8B": "Qwen3-8B", "/m/S-1.Q4_1.gguf": "S-1.Q4_1"}


def test_every_value_of_a_file_arrives(tmp_path: Path) -> None:
    config = load(tmp_path, FULL)
    assert config.engine.model == Path("/models/qwen")
    assert config.model_id == "qwen"
    assert config.pools == PoolsConfig(prefill=2, decode=3, hybrid=0)
    assert config.engine.cache.kv_memory_bytes == 3 * 512 * 1024 * 1024
    assert config.engine.cache.prefix_cache is False
    assert (config.http.host, config.http.port) == ("0.0.0.0", 8001)
    assert config.store.redis == "redis://cache:6379/2"
    assert config.security.api_keys == ("a", "b")
    assert config.transfer.lease_s == 5.0


@pytest.mark.parametrize("checksum", ["off", "crc32c", "xxh3"])
def test_off_is_a_word_and_reaches_the_agents(tmp_path: Path, checksum: str) -> None:
    """Guards against YAML 1.1, which reads an unquoted off as false."""
    config = load(tmp_path, f"transfer: {{checksum: {checksum}}}\nengine: {{prefix_cache: False}}")
    assert config.transfer.checksum == checksum
    assert config.engine.cache.prefix_cache is False


@pytest.mark.parametrize("text", ["", "# only a comment\n", "pools:\n"])
def test_nothing_said_means_the_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pools: {prefil: 2}", "pools.prefil: unknown setting; did you mean 'prefill'?"),
        ("engines: {}", "engines: unknown setting; did you mean 'engine'?"),
        ("engine: {block-size: 16}", "engine.block-size: unknown setting; did you mean 'block_size'?"),
        ("pools: {qqq: 1}", "pools.qqq: unknown setting; known here are prefill, decode, hybrid"),
        ("pools: {prefill: two}", "pools.prefill: expected a whole number, got 'two'"),
        ("pools: {prefill: 1.5}", "pools.prefill: expected a whole number, got 1.5"),
        ("pools: {prefill: true}", "pools.prefill: expected a whole number, got True"),
        ("pools: {prefill: -1}", "pools.prefill: must be from 0 to 4096, got -1"),
        ("pools: [1, 2]", "pools: expected a mapping of settings, got a list"),
        ("http: {port: 65536}", "http.port: must be from 0 to 65535, got 65536"),
        ("http: {port: '80'}", "http.port: expected a whole number, got '80'"),
        ("http: {host: 5}", "http.host: expected text, got 5"),
        ("transfer: {lease_s: 0}", "transfer.lease_s: must be from 0.001 to 86400, got 0.0"),
        ("transfer: {checksum: true}", "transfer.checksum: expected text, got True"),
        ("transfer: {checksum: crc32}", "transfer.checksum: must be one of off, crc32c, xxh3, got 'crc32'"),
        ("engine: {prefix_cache: yes}", "engine.prefix_cache: expected true or false, got 'yes'"),
        ("engine: {prefix_cache: 1}", "engine.prefix_cache: expected true or false, got 1"),
        ("model: {dtype: float23}", "model.dtype: must be one of auto, float32, bfloat16, float16, got 'float23'"),
        ("model: {dtype: float23}", "did you mean 'float32'?"),
        ("model: {path: 3}", "model.path: expected a path, got 3"),
        ("engine: {kv_memory: 2 gigs}", "engine.kv_memory: expected a size such as 512MiB or 2GiB, got '2 gigs'"),
        ("engine: {kv_memory: 1KiB}", "engine.kv_memory: must be at least 65536 bytes, got 1024"),
        ("security: {api_keys: abc}", "security.api_keys: expected a list of texts, got 'abc'"),
        ("security: {api_keys: [a, ' ']}", "security.api_keys: a key is empty"),
        ("security: {api_keys: [a, 'b ']}", "security.api_keys: a key begins or ends with a blank"),
        ('security: {api_keys: ["\\tb"]}', "security.api_keys: a key begins or ends with a blank"),
        ("security: {api_keys: [a, 1]}", "security.api_keys.1: expected text, got 1"),
        ("pools: {prefill: 1, prefill: 2}", "key 'prefill' appears twice"),
        ("pools: {prefill: 0}", "pools: no engine can prefill; set --prefill 1, or --hybrid 1"),
        ("pools: {prefill: 0, decode: 0}", "pools: no engine at all"),
        ("engine: {prefill_chunk_tokens: 4096}", "exceeds engine.max_tokens_per_step (2048)"),
        ("engine: {prefill_chunk_tokens: 0}", "engine.prefill_chunk_tokens: must be from 1 to 1048576, got 0"),
        ("engine: {prefill_chunk_tokens: true}", "expected a whole number or 'auto', got True"),
        ("engine: {prefill_chunk_tokens: atuo}", "expected a whole number or 'auto', got 'atuo'"),
        ("pools: {", "is not valid YAML"),
        ("- 1", "expected a mapping at the top, got a list"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("written", "size"),
    [("65536", 65536), ("64k", 64_000), ("64KiB", 65536), ("2GB", 2 * 10**9), ("2 GiB", 2 << 30), ("0.5Gi", 1 << 29)],
)
def test_sizes(tmp_path: Path, written: str, size: int) -> None:
    if size < 65536:
        with pytest.raises(ConfigError, match="at least 65536 bytes, got 64000"):
            load(tmp_path, f"engine: {{kv_memory: {written}}}")
        return
    assert load(tmp_path, f"engine: {{kv_memory: {written}}}").engine.cache.kv_memory_bytes == size


def test_a_flag_overrides_the_file_and_is_named_in_errors(tmp_path: Path) -> None:
    port = Override("http.port", 9000, "--port")
    assert load(tmp_path, "http: {port: 8001, replicas: 2}", port).http.port == 9000
    assert load(tmp_path, "http: {port: 8001, replicas: 2}", port).http.replicas == 2
    with pytest.raises(ConfigError, match=r"^--port: must be from 0 to 65535, got 70000$"):
        load_config(None, [Override("http.port", 70000, "--port")])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_config(tmp_path)


def test_secrets_do_not_print(tmp_path: Path) -> None:
    """Guards logs and tracebacks: a config that prints itself must not print its keys."""
    config = load(tmp_path, "security: {cluster_secret: hush, api_keys: [hush2]}")
    assert "hush" not in repr(config)


def test_engine_config_resolves_defaults_by_device() -> None:
    config = ClusterConfig()
    cpu, gpu = config.engine_config("cpu", threads=1), config.engine_config("cuda", threads=None)
    assert (cpu.cache.block_size_on("cpu"), gpu.cache.block_size_on("cuda")) == (16, 32)
    assert (cpu.threads, gpu.threads) == (1, None)
    assert cpu.model.is_absolute()


@pytest.mark.parametrize(
    ("text", "device", "chunk"),
    [
        ("", "cpu", 512),
        ("", "cuda", "auto"),
        ("engine: {max_tokens_per_step: 200}", "cpu", 200),
        ("engine: {prefill_chunk_tokens: auto}", "cpu", "auto"),
        ("engine: {prefill_chunk_tokens: 512}", "cuda", 512),
        ("engine: {prefill_chunk_tokens: 33}", "cpu", 33),
    ],
)
def test_chunks_are_measured_where_nothing_else_is_said(
    tmp_path: Path, text: str, device: str, chunk: int | str
) -> None:
    engine = load(tmp_path, text).engine_config(device, threads=1)
    assert (engine.batch.prefill_chunk_tokens or engine.batch.chunk_tokens) == chunk


def test_engines_that_share_a_gpu_share_its_memory(tmp_path: Path) -> None:
    config = load(tmp_path, "engine: {gpus: 0.5, gpu_memory_fraction: 0.8, block_size: 128, threads: 3}")
    engine = config.engine_config("cuda", threads=1)
    assert engine.cache.gpu_memory_fraction == pytest.approx(0.4)
    assert (engine.cache.block_size, engine.threads) == (128, 3)
