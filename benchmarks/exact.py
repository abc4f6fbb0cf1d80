"""Whether a resumed stream goes on with the same tokens, and what a resume costs.

    PYTHONPATH=tests python benchmarks/exact.py --model MODEL --streams 200
    KVBATON_AMX=0 PYTHONPATH=tests python benchmarks/exact.py --model MODEL      # the same with other instructions

Streams of `--tokens` tokens run together, greedy and at temperature 0.8; then each comes again as a resume, its first
`--cut` tokens given as emitted, and no cache has any of it. Equal means: the rest is the same, token by token. Last,
the time to the first token of a resume with `--emitted` tokens, beside that of a prompt of the same length.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine, configure_threads
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.kernels.native_lib import native_library
from support.worker_bench import WorkerBench

TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`first_difference` are the tokens, counted from the resume, up to the first that differs, of each that does."""

    temperature: float
    streams: int
    equal: int
    first_difference: tuple[int, ...]


def stream(number: int, temperature: float, tokens: int, vocab: int) -> Request:
    """A prompt of 8 to 71 tokens that no other stream has."""
    prompt = tuple((number * 7919 + i * 104729 + i * i * 31) % (vocab - 100) + 50 for i in range(8 + number % 64))
    sampling = SamplingParams(max_tokens=tokens, temperature=temperature, seed=number, ignore_eos=True)
    return Request(f"{temperature}-{number}", prompt, sampling)


def answers(made: WorkerBench, requests: list[Request]) -> list[tuple[int, ...]]:
    """What each request draws, all of them submitted at once."""
    for request in requests:
        made.submit(request)
    while made.worker.step(made.now):
        made.collect()
    drawn: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for output in made.outputs:
        if output.request_id in drawn and output.token_id is not None:
            drawn[output.request_id].append(output.token_id)
    return [tuple(drawn[request.request_id]) for request in requests]


def resumed(engine: Engine, temperature: float, args: argparse.Namespace) -> Outcome:
    """Run undisturbed, then resume."""
    requests = [stream(i, temperature, args.tokens, engine.vocab_size) for i in range(args.streams)]
    whole = answers(WorkerBench(engine, BatchConfig()), requests)
    cut = [
        replace(request, emitted=tokens[: args.cut], epoch=1) for request, tokens in zip(requests, whole, strict=True)
    ]
    rest = answers(WorkerBench(engine, BatchConfig()), cut)
    differing = tuple(
        next(i for i, (a, b) in enumerate(zip(tokens[args.cut :], got, strict=True)) if a != b)
        for tokens, got in zip(whole, rest, strict=True)
        if tokens[args.cut :] != got
    )
    return Outcome(temperature, args.streams, args.streams - len(differing), differing)


def first_token_s(made: WorkerBench, request: Request) -> float:
    """Seconds from submit to the first token of a lone request."""
    made.submit(request)
    started = time.perf_counter()
    while not made.outputs:
        made.worker.step(made.now)
        made.collect()
    taken = time.perf_counter() - started
    made.run()
    made.outputs.clear()
    return taken


def resume_cost(engine: Engine, emitted: int) -> dict[str, float]:
    """Milliseconds, best of three: a resume with `emitted` tokens behind a prompt of 200, and a prompt of as many."""
    made = WorkerBench(engine, BatchConfig())
    tokens = stream(0, 0.0, 1, engine.vocab_size).prompt * (200 + emitted)
    sampling = SamplingParams(max_tokens=emitted + 1, temperature=0.0, ignore_eos=True)
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    resume = Request("resume", tokens[:200], sampling, emitted=tokens[200 : 200 + emitted], epoch=1)
    prompt = Request("prompt", tokens[: 200 + emitted], one)
    return {
        name: round(1e3 * min(first_token_s(made, request) for _ in range(3)), 1)
        for name, request in (("resume_ms", resume), ("prompt_ms", prompt))
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder or a .gguf file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--cut", type=int, default=80)
    parser.add_argument("--emitted", type=int, default=500)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    configure_threads(args.threads)
    cache = CacheConfig(prefix_cache=False)
    engine = Engine.load(EngineConfig(args.model, dtype=args.dtype, cache=cache, quantization=args.quantization))
    library = native_library()
    report = {
        "model": args.model.name,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "kernels": "torch" if library is None else library.kvb_describe().decode(),
        "tokens": args.tokens,
        "cut": args.cut,
        "outcomes": [asdict(resumed(engine, temperature, args)) for temperature in TEMPERATURES],
        "cost": resume_cost(engine, args.emitted),
    }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if all(outcome["equal"] == args.streams for outcome in report["outcomes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
