"""How much of the held KV memory is unused, and how much prefill a repeated prefix saves: the real engine and worker.

    python benchmarks/kv_waste.py                       # a tiny model made on the spot, CPU, blocks of 16
    python benchmarks/kv_waste.py --model FOLDER --block-size 32 --device cuda

Waste: 64 sequences of mixed lengths are kept running (one that ends is replaced). After every step each held block is
looked at once, however many share it: waste = 1 - filled slots / held slots. Prefix: one prompt of 1,000 shared tokens
and 32 of its own, then 16 more with the same prefix; what counts is the tokens that the model computes. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.batch import Pending, ScheduledRow
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.orders import LegKind, Submit, Submitted
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import make_tiny

SEQUENCES = 64
PREFIX_TOKENS, OWN_TOKENS, FOLLOWERS = 1000, 32, 16


class NoPeers:
    """The transfer agent of an engine that works alone: nothing here may ask for a hand-off."""

    def offer(self, *_: object) -> NoReturn:
        raise RuntimeError("a hand-off in a benchmark without peers")

    blocks_ready = finish = grant = ack = cancel = offer


class CountingEngine:
    """An engine that also counts the tokens that it computes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.kv = engine.kv
        self.max_model_len = engine.max_model_len
        self.pipelined = engine.pipelined
        self.vocab_size = engine.vocab_size
        self.computed_tokens = 0

    def launch(self, rows: list[ScheduledRow]) -> Pending:
        self.computed_tokens += sum(row.num_tokens for row in rows)
        return self._engine.launch(rows)

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        self._engine.copy_blocks(pairs)


@dataclass(frozen=True, slots=True)
class Waste:
    """Over all steps with more than half of the sequences decoding (the others' prompts wait or are being computed).

    `bound` is half a block a sequence: what blocks of this size cost at best.
    """

    sequences: int
    block_size: int
    steps: int
    mean_tokens: float
    mean_waste: float
    worst_waste: float
    bound: float


@dataclass(frozen=True, slots=True)
class PrefixSaving:
    """`skipped_share` is of the prefix's tokens, over the requests after the first."""

    prefix_tokens: int
    block_size: int
    followers: int
    computed_tokens: int
    skipped_share: float


def submit(worker: Worker, name: str, prompt: tuple[int, ...], output_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True, min_tokens=output_tokens)
    worker.handle(Submitted(1, Submit(Request(name, prompt, sampling), LegKind.LOCAL)), 0.0)


def mixed_requests(rng: random.Random, vocab: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Prompts log-normal round 256 tokens (16 to 2,048), answers of 32 to 256 tokens."""
    while True:
        length = min(2048, max(16, round(rng.lognormvariate(5.545, 0.8))))
        yield tuple(rng.choices(range(vocab), k=length)), rng.randint(32, 256)


def filled_slots(worker: Worker, block_size: int) -> int:
    """Slots with a token's KV in all blocks that sequences hold, each block counted once."""
    filled: dict[int, int] = {}
    for leg in worker.ledger.legs:
        for seq in (*leg.live.values(), *([leg.prompt] if leg.prompt else [])):
            for index, block_id in enumerate(seq.block_table):
                used = min(block_size, max(0, seq.num_computed - index * block_size))
                filled[block_id] = max(filled.get(block_id, 0), used)
    return sum(filled.values())


def measure_waste(engine: CountingEngine, limits: BatchConfig, steps: int) -> Waste:
    worker = Worker(engine, NoPeers(), limits)
    requests = mixed_requests(random.Random(0), engine.vocab_size)
    block_size = engine.kv.block_size
    wastes: list[float] = []
    tokens: list[float] = []
    serial = 0
    while len(wastes) < steps:
        while worker.num_requests < SEQUENCES:
            submit(worker, f"r{serial}", *next(requests))
            serial += 1
        worker.step(0.0)
        worker.take_outputs()
        filled, held = filled_slots(worker, block_size), engine.kv.counts().held * block_size
        if (
            len(worker.decode.scheduler.running) > SEQUENCES // 2
        ):  # past the start, when prompts are still being computed
            wastes.append(1 - filled / held)
            tokens.append(filled / worker.num_requests)
    mean_tokens = sum(tokens) / len(tokens)
    drain(worker)
    engine.kv.check()
    bound = (block_size / 2) / (mean_tokens + block_size / 2)
    return Waste(SEQUENCES, block_size, steps, mean_tokens, sum(wastes) / steps, max(wastes), bound)


def drain(worker: Worker) -> None:
    while worker.step(0.0):
        worker.take_outputs()


def measure_prefix(engine: CountingEngine, limits: BatchConfig) -> PrefixSaving:
    worker = Worker(engine, NoPeers(), limits)
    rng = random.Random(1)
    prefix = tuple(rng.choices(range(engine.vocab_size), k=PREFIX_TOKENS))

    def one(name: str) -> int:
        before = engine.computed_tokens
        submit(worker, name, prefix + tuple(rng.choices(range(engine.vocab_size), k=OWN_TOKENS)), 1)
        drain(worker)
        return engine.computed_tokens - before

    first = one("first")
    if first != PREFIX_TOKENS + OWN_TOKENS:
        raise RuntimeError(f"the first request computed {first} tokens: the cache was not empty")
    computed = sum(one(f"f{index}") for index in range(FOLLOWERS))
    prefix_computed = computed - FOLLOWERS * OWN_TOKENS
    skipped = 1 - prefix_computed / (FOLLOWERS * PREFIX_TOKENS)
    return PrefixSaving(PREFIX_TOKENS, engine.kv.block_size, FOLLOWERS, computed, skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a tiny model made on the spot)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--kv-memory", type=int, default=256 << 20, metavar="BYTES")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "tiny"
        if args.model is None:
            make_tiny(model)
        limits = BatchConfig()
        cache = CacheConfig(block_size=args.block_size, kv_memory_bytes=args.kv_memory)
        config = EngineConfig(model=model, device=args.device, cache=cache, batch=limits)
        prefix = measure_prefix(CountingEngine(Engine.load(config)), limits)
        waste = measure_waste(CountingEngine(Engine.load(config)), limits, args.steps)
    text = json.dumps({"waste": asdict(waste), "prefix": asdict(prefix)}, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
