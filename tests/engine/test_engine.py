"""Loading an engine: what is refused and how, how large its pool is, what it tells a peer, and block copies."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.engine import memory
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine, _flash_prefill, _independent, configure_threads
from kvbaton.engine.kv.kv_cache import KVGeometry
from kvbaton.engine.memory import num_blocks_for, step_workspace_bytes, usable_model_len
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import load_model
from kvbaton.kernels.backend import MAX_GATHERED_TOKENS, kernels_for
from kvbaton.settings import ConfigError
from support.engine_driver import EngineDriver, output
from support.oracle import TinyModels, prompts

CPU = torch.device("cpu")
GEOMETRY = KVGeometry(num_layers=4, num_kv_heads=2, head_dim=16, block_size=16, dtype=torch.float32)
BLOCK_BYTES = 16 * 4 * 2 * 2 * 16 * 4
LARGE = replace(GEOMETRY, num_layers=32)
LARGE_BYTES = 8 * BLOCK_BYTES


@pytest.fixture
def config(tiny_model: TinyModels) -> EngineConfig:
    return EngineConfig(tiny_model("llama"), cache=CacheConfig(kv_memory_bytes=64 * BLOCK_BYTES))


def test_pool_size_is_the_memory_asked_for() -> None:
    """Guards --kv-memory: whole blocks, never more than asked."""
    assert (GEOMETRY.block_bytes, LARGE.block_bytes) == (BLOCK_BYTES, LARGE_BYTES)
    for size, wanted in ((10 * LARGE_BYTES, 10), (11 * LARGE_BYTES - 1, 10), (2 * LARGE_BYTES, 2)):
        assert num_blocks_for(CacheConfig(kv_memory_bytes=size), LARGE, CPU) == wanted


@pytest.mark.parametrize("size", [2 * LARGE_BYTES - 1, 65536])
def test_a_pool_of_less_than_two_blocks_is_refused(size: int) -> None:
    """Guards against an engine that starts and can serve nothing."""
    with pytest.raises(ConfigError, match=f"KV memory of {size} bytes is less than 2 blocks of {LARGE_BYTES} bytes"):
        num_blocks_for(CacheConfig(kv_memory_bytes=size), LARGE, CPU)


def test_default_pool_on_cpu_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards small machines and tiny models: a GiB, half of what is free, or as many blocks as make sense."""
    large = replace(GEOMETRY, num_layers=64)
    default = CacheConfig()
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 1 << 22, "SC_PAGE_SIZE": 4096}[name])
    assert num_blocks_for(default, large, CPU) == memory.CPU_DEFAULT_BYTES // large.block_bytes
    assert num_blocks_for(default, replace(GEOMETRY, num_layers=1), CPU) == memory.MAX_DEFAULT_BLOCKS
    monkeypatch.setattr(memory.os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert num_blocks_for(default, GEOMETRY, CPU) == 1000 * 4096 // 2 // BLOCK_BYTES


def test_a_short_pool_caps_the_model_length(caplog: pytest.LogCaptureFixture) -> None:
    """Guards admission: a sequence longer than the pool could never run, and the operator must know."""
    with caplog.at_level(logging.WARNING):
        assert usable_model_len(8192, 64, 16) == 1024
    assert "KV pool of 1024 tokens is smaller than max_model_len 8192" in caplog.text
    caplog.clear()
    assert usable_model_len(1024, 64, 16) == 1024
    assert caplog.text == ""


def test_a_loaded_engine_says_what_it_is(config: EngineConfig) -> None:
    """Guards the attributes that workers and registry read."""
    engine = Engine.load(config)
    assert (engine.kv.num_blocks, engine.cache.num_blocks, engine.kv.block_size) == (64, 64, 16)
    assert (engine.max_model_len, engine.vocab_size) == (1024, 512)
    assert engine.geometry == GEOMETRY
    assert engine.cache.block_bytes == BLOCK_BYTES
    assert Engine.load(replace(config, max_model_len=100)).max_model_len == 100


def test_steps_keep_their_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that takes all that is free after the weights leaves the first large step without memory."""
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (1000 * BLOCK_BYTES, 2000 * BLOCK_BYTES))
    gpu, cache = torch.device("cuda"), CacheConfig(gpu_memory_fraction=0.9)
    assert num_blocks_for(cache, GEOMETRY, gpu) == 900
    assert num_blocks_for(cache, GEOMETRY, gpu, 50 * BLOCK_BYTES) == 900
    assert num_blocks_for(cache, GEOMETRY, gpu, 300 * BLOCK_BYTES) == 700
    with pytest.raises(ConfigError, match="KV memory of 0 bytes"):
        num_blocks_for(cache, GEOMETRY, gpu, 1001 * BLOCK_BYTES)


def test_the_memory_of_a_step_is_counted_in_full(config: EngineConfig) -> None:
    """Guards the parts: activations, logits of two steps, partial attention (twice: the graphs have their own)."""
    model = replace(load_model_config(config.model), vocab_size=1000, hidden_size=10, intermediate_size=20)
    model = replace(model, num_heads=2, num_kv_heads=1, head_dim=6)
    batch = BatchConfig(max_tokens_per_step=100, max_running=8)
    layer = 4 * 10 + 3 * 12 + 2 * 6 + 3 * 20
    wanted = 100 * layer * 2 + 8 * 1000 * (2 + 4 + 4) + 2 * (8 + 256) * 2 * 64 * (6 + 2) * 4
    assert step_workspace_bytes(model, batch, 2) == wanted * 5 // 4
    assert step_workspace_bytes(model, batch, 2, gathered_tokens=1000) == (wanted + 2 * 1000 * 6 * 2) * 5 // 4
    decode = pytest.importorskip("kvbaton.kernels.triton_decode", reason="triton is not installed on this platform")
    assert decode.MAX_SPLITS == memory.MAX_ATTENTION_SPLITS


def test_flash_prefill_reaches_the_kernels_of_a_gpu(config: EngineConfig) -> None:
    """Guards the setting's way: what an engine on a GPU asks for, and what it is given."""
    pytest.importorskip("triton", reason="triton is not installed on this platform")
    gpu = torch.device("cuda")
    model = load_model(config.model, CPU, "bfloat16")
    assert not _flash_prefill(config, model, gpu)
    assert _flash_prefill(replace(config, prefill_attention="torch"), model, gpu)
    most = [kernels_for(gpu, None, way).max_gathered_tokens for way in (False, True)]  # type: ignore[attr-defined]
    assert most == [0, MAX_GATHERED_TOKENS]


def test_prefix_cache_can_be_off(config: EngineConfig) -> None:
    """Guards the setting's way to the manager."""
    engine = Engine.load(replace(config, cache=replace(config.cache, prefix_cache=False)))
    driver = EngineDriver(engine)
    seq = driver.add(prompts()[2])
    driver.prefill(seq, 100)
    engine.kv.commit(seq.hashes(16, 2), seq.block_table[:2])
    driver.finish()
    assert engine.kv.counts().cached == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 8193}, "max_model_len 8193 exceeds the model's max_position_embeddings, 8192"),
        ({"device": "toaster"}, "device 'toaster' is not a device"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        (
            {"prefill_attention": "torch"},
            "prefill_attention torch is for bfloat16 and float16 on cuda, not for float32",
        ),
        ({"prefill_attention": "torch", "dtype": "bfloat16"}, "on cuda, not for bfloat16 on cpu"),
        ({"model": Path("/does/not/exist")}, "/does/not/exist"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: EngineConfig, change: dict[str, object], message: str) -> None:
    """Guards the operator: the setting at fault is named at start, before anything is served."""
    with pytest.raises(ConfigError, match=message):
        Engine.load(replace(config, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (EngineConfig, {"max_model_len": 1}, "model.max_model_len: must be at least 2, got 1"),
        (EngineConfig, {"dtype": "int4"}, "model.dtype: must be one of auto, float32, bfloat16, float16, got 'int4'"),
        (EngineConfig, {"quantization": "int4"}, "engine.quantization: must be one of none, int8, got 'int4'"),
        (EngineConfig, {"prefill_attention": "x"}, "engine.prefill_attention: must be one of triton, torch, got 'x'"),
        (CacheConfig, {"block_size": 0}, "engine.block_size: must be from 1 to 512, got 0"),
        (CacheConfig, {"gpu_memory_fraction": 0.0}, "engine.gpu_memory_fraction: must be from 0.0001 to 1, got 0.0"),
        (CacheConfig, {"kv_memory_bytes": 1000}, "engine.kv_memory: must be at least 65536 bytes, got 1000"),
        (BatchConfig, {"max_handoffs": 0}, "max_handoffs: must be at least 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused_however_they_come(part: type, change: dict[str, object], message: str) -> None:
    """Guards benchmarks and libraries, which build these without the reader of the cluster's file."""
    with pytest.raises(ConfigError) as refused:
        part(**change)
    assert message in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_named(config: EngineConfig) -> None:
    """Guards against a stack trace from inside torch."""
    with pytest.raises(ConfigError, match="device 'cuda:1' does not exist: this process sees 0 CUDA devices"):
        Engine.load(replace(config, device="cuda:1"))


def test_compatibility_names_what_differs(config: EngineConfig, tiny_model: TinyModels) -> None:
    """Guards HELLO: equal engines agree, and each difference shows under its own name."""
    engine = Engine.load(config)
    base = dict(engine.compatibility())
    order = ["model", "dtype", "quantization", "num_layers", "num_kv_heads", "head_dim", "block_size", "kv_layout"]
    assert [name for name, _ in engine.compatibility()] == order
    assert list(base.values())[1:] == ["float32", "none", "4", "2", "16", "16", "1"]
    assert base == dict(Engine.load(replace(config, max_model_len=64)).compatibility())
    blocks = replace(config, cache=CacheConfig(block_size=32, kv_memory_bytes=1 << 20))
    for other, names in (
        (blocks, {"block_size"}),
        (replace(config, dtype="bfloat16"), {"dtype"}),
        (replace(config, quantization="int8"), {"quantization"}),
        (replace(config, model=tiny_model("qwen2")), {"model"}),
    ):
        fields = dict(Engine.load(other).compatibility())
        assert fields.keys() == base.keys()
        assert {name for name in base if fields[name] != base[name]} == names


def test_copied_blocks_follow_the_order_of_the_pairs(config: EngineConfig) -> None:
    """Guards copy-on-write in a step that also reuses a freed source: later pairs see earlier ones."""
    engine = Engine.load(config)
    for block_id in range(6):
        engine.cache.pool[block_id] = float(block_id)
    engine.copy_blocks([(0, 1), (0, 2), (3, 0), (1, 4), (5, 1)])
    assert engine.cache.pool[:6].flatten(1)[:, 0].tolist() == [3.0, 5.0, 0.0, 3.0, 0.0, 5.0]
    assert all((block == block.flatten()[0]).all() for block in engine.cache.pool[:6])
    engine.copy_blocks([])


COPIES = st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1])


@given(st.lists(COPIES, max_size=8))
def test_copies_that_depend_on_each_other_are_not_one_launch(pairs: list[tuple[int, int]]) -> None:
    """Guards the kernel's contract: in a launch no destination is written twice or read."""
    batches = _independent(pairs)
    assert [pair for batch in batches for pair in batch] == pairs
    for batch in batches:
        written = [destination for _, destination in batch]
        assert len(set(written)) == len(written)
        assert not set(written) & {source for source, _ in batch}


def test_forked_samples_write_to_their_own_blocks(config: EngineConfig) -> None:
    """Guards copy-on-write on real memory: two continuations of one prompt equal two prompts of their own."""
    engine = Engine.load(config)
    driver = EngineDriver(engine)
    prompt = prompts()[1]  # 17 tokens: one full block and one token
    wanted = []
    for first in (11, 12):
        seq = driver.add([*prompt, first])
        driver.prefill(seq, 100)
        driver.decode(8, seq)
        wanted.append(output(seq))
    parent = driver.add(prompt)
    driver.prefill(parent, 100)
    forks = []
    for first in (11, 12):
        fork = driver.add(prompt)
        engine.kv.release(fork.block_table)
        fork.block_table = list(parent.block_table)
        engine.kv.fork(fork.block_table)
        fork.num_computed = len(prompt)
        fork.tokens.append(first)
        forks.append(fork)
    engine.kv.release(parent.block_table)
    parent.block_table = []
    pairs = []
    for fork in forks:
        fork.block_table[1], copy = engine.kv.make_writable(fork.block_table[1])
        pairs += [copy] if copy else []
    assert len(pairs) == 1
    engine.copy_blocks(pairs)
    driver.decode(9, *forks)
    assert [output(fork)[1:] for fork in forks] == wanted
    assert forks[0].block_table[0] == forks[1].block_table[0]
    driver.finish()


def test_threads_are_set_for_the_process() -> None:
    """Guards the setting; None leaves torch's choice."""
    before = torch.get_num_threads()
    try:
        configure_threads(2)
        assert torch.get_num_threads() == 2
        configure_threads(None)
        assert torch.get_num_threads() == 2
        with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
            configure_threads(0)
    finally:
        torch.set_num_threads(before)
