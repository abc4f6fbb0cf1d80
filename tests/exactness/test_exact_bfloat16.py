"""In bfloat16, to the bit: a position's KV and tokens are the same whatever it was computed with.

Argmax hides small differences, so the KV of every position is compared as well, read from the pool. Streams are greedy
and drawn at temperature 0.8. What the undisturbed run gives is right by definition: transformers rounds differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kvbaton.engine.batch import ScheduledRow
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.sequence import Sequence
from kvbaton.engine.tiny import Family
from kvbaton.kernels.native_lib import native_library
from support.oracle import TinyModels, prompts
from support.worker_bench import WorkerBench

pytestmark = pytest.mark.slow

NUM_TOKENS = 120
FAMILIES = (Family.LLAMA, Family.QWEN3)
TEMPERATURES = (0.0, 0.8)
Rows = list[tuple[int, int]]  # computed so far, tokens to compute now


@pytest.fixture(scope="module", params=["none", "int8"])
def quantization(request: pytest.FixtureRequest) -> str:
    if native_library() is None:
        pytest.skip("torch's own products depend on the number of rows")
    return str(request.param)


@pytest.fixture(scope="module", params=FAMILIES)
def config(request: pytest.FixtureRequest, tiny_model: TinyModels, quantization: str) -> EngineConfig:
    model = tiny_model(request.param)
    return EngineConfig(model, dtype="bfloat16", cache=CacheConfig(kv_memory_bytes=8 << 20), quantization=quantization)


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Engine:
    return Engine.load(config)


def stream(name: str, number: int, temperature: float, emitted: tuple[int, ...] = ()) -> Request:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=temperature, seed=number, ignore_eos=True)
    return Request(name, tuple(prompts()[number % 7]), sampling, emitted=emitted, epoch=int(bool(emitted)))


class Lone:
    """One sequence of an engine, computed in rows that a test chooses, and its KV by position."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self.seq = Sequence(request, 0.0)

    def __enter__(self) -> Lone:
        size = self._engine.kv.block_size
        self.seq.block_table = self._engine.kv.allocate(-(-(self.seq.num_prompt + NUM_TOKENS) // size))
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine.kv.free(self.seq.block_table)

    def run(self, *counts: int) -> None:
        """Rows of so many tokens; the last one draws where it reaches the end."""
        for count in counts:
            draws = self.seq.num_computed + count == len(self.seq.tokens)
            row = ScheduledRow(self.seq, count, (0,) if draws else ())
            (drawn,) = self._engine.launch([row]).wait().sampled
            self.seq.num_computed += count
            self.seq.tokens.extend(token.token_id for token in drawn)

    def kv(self, first: int = 0) -> torch.Tensor:
        """[positions, layers, 2, kv_heads, head_dim] of what is computed, from position `first` on."""
        pool = self._engine.cache.pool[torch.tensor(self.seq.block_table)].movedim(4, 1).flatten(0, 1)
        return pool[first : self.seq.num_computed].clone()


@pytest.fixture(params=TEMPERATURES)
def undisturbed(request: pytest.FixtureRequest, engine: Engine) -> Iterator[tuple[Request, list[int], torch.Tensor]]:
    """A request, its context with all tokens but the last, and their KV: the prompt at once, then step by step."""
    wanted = stream("undisturbed", 6, request.param)
    with Lone(engine, wanted) as lone:
        lone.run(len(wanted.prompt), *[1] * (NUM_TOKENS - 1))
        yield wanted, lone.seq.tokens, lone.kv()


@pytest.mark.parametrize("chunk", [1, 16, 50, 64, 512])
def test_chunks_of_a_prompt(engine: Engine, undisturbed: tuple[Request, list[int], torch.Tensor], chunk: int) -> None:
    """A last piece of one row included: here behind four of 50 tokens."""
    wanted, tokens, kv = undisturbed
    length = len(wanted.prompt)
    with Lone(engine, wanted) as lone:
        lone.run(*(min(chunk, length - at) for at in range(0, length - 1, chunk)))
        lone.run(*[1] * (length - lone.seq.num_computed))
        assert lone.seq.tokens == tokens[: length + 1]
        assert torch.equal(lone.kv(), kv[:length])


@pytest.mark.parametrize("cut", [1, 2, 17, 80, NUM_TOKENS - 1])
@pytest.mark.parametrize("pieces", [1, 3])
def test_resumed(engine: Engine, undisturbed: tuple[Request, list[int], torch.Tensor], cut: int, pieces: int) -> None:
    """Prompt and emitted tokens at once, or in rows whose borders lie anywhere, then the rest step by step."""
    wanted, tokens, kv = undisturbed
    length = len(wanted.prompt)
    emitted = tuple(tokens[length : length + cut])
    with Lone(engine, replace(wanted, emitted=emitted, epoch=1)) as lone:
        each = -(-(length + cut) // pieces)
        lone.run(*(min(each, length + cut - at) for at in range(0, length + cut, each)))
        lone.run(*[1] * (NUM_TOKENS - 1 - cut))
        assert lone.seq.tokens == tokens
        assert torch.equal(lone.kv(), kv)


def make_bench(config: EngineConfig, blocks: int | None = None, chunk: int = 64, pipelined: str = "off") -> WorkerBench:
    engine = Engine.load(replace(config, pipelined=pipelined))
    if blocks is not None:
        size = blocks * engine.geometry.block_bytes
        engine = Engine.load(replace(config, cache=CacheConfig(kv_memory_bytes=size), pipelined=pipelined))
    return WorkerBench(engine, BatchConfig(max_tokens_per_step=256, prefill_chunk_tokens=chunk))


@pytest.fixture(scope="module")
def answers(config: EngineConfig) -> dict[tuple[int, float], list[int | None]]:
    """Each stream alone on an engine."""
    bench = make_bench(config, chunk=512)
    found = {}
    for number in range(7):
        for temperature in TEMPERATURES:
            bench.submit(stream(f"{number}-{temperature}", number, temperature))
            bench.run()
            found[number, temperature] = bench.tokens(f"{number}-{temperature}")
    return found


@pytest.mark.parametrize("pipelined", ["off", "on"])
def test_preempted(config: EngineConfig, answers: dict[tuple[int, float], list[int | None]], pipelined: str) -> None:
    """All streams at once in a pool that is too small for them, so that some are computed again in mid-stream."""
    bench = make_bench(config, blocks=40, pipelined=pipelined)
    for number, temperature in answers:
        bench.submit(stream(f"{number}-{temperature}", number, temperature))
    bench.run()
    assert bench.worker.decode.scheduler.num_preemptions > 0
    for (number, temperature), tokens in answers.items():
        assert bench.tokens(f"{number}-{temperature}") == tokens
    bench.assert_clean()


@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_resumed_among_others(
    config: EngineConfig, answers: dict[tuple[int, float], list[int | None]], chunk: int
) -> None:
    """Streams that had emitted something, beside others that begin; twice, the second time on cached prefixes."""
    bench = make_bench(config, chunk=chunk)
    for turn in range(2):
        for place, ((number, temperature), tokens) in enumerate(answers.items()):
            emitted = tuple(token for token in tokens[: place * 37 % NUM_TOKENS] if token is not None)
            bench.submit(stream(f"{turn}-{number}-{temperature}", number, temperature, emitted))
            bench.step()
        bench.run()
        for place, ((number, temperature), tokens) in enumerate(answers.items()):
            assert bench.tokens(f"{turn}-{number}-{temperature}") == tokens[place * 37 % NUM_TOKENS :]
    bench.assert_clean()


def test_a_resume_finds_what_decode_made_and_a_prompt_does_not(config: EngineConfig) -> None:
    """Blocks with generated tokens serve a resume of the same stream; as part of a prompt they are computed anew."""
    bench = make_bench(config)
    first = stream("first", 6, 0.0)
    bench.submit(first)
    bench.run()
    tokens = tuple(token for token in bench.tokens("first") if token is not None)
    assert len(first.prompt) % 16, "a block has to hold both"
    bench.submit(stream("resume", 6, 0.0, tokens[:100]))
    bench.submit(replace(first, request_id="next turn", prompt=first.prompt + tokens[:100]))
    bench.run()
    cached = {o.request_id: o.cached_tokens for o in bench.outputs if o.cached_tokens is not None}
    assert cached == {
        "first": 0,
        "resume": (len(first.prompt) + 99) // 16 * 16,
        "next turn": len(first.prompt) // 16 * 16,
    }
    bench.assert_clean()
