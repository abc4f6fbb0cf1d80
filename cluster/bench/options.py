"""The command line of `kvbaton bench serve`, read into frozen options. Nothing here touches the network."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from kvbaton.cluster.bench.connection import Address, parse_url
from kvbaton.cluster.bench.lengths import Lengths, parse_lengths
from kvbaton.cluster.bench.metrics import Slo, parse_slo

DEFAULT_REQUESTS = 100


class UsageError(Exception):
    """Options that do not go together or do not parse."""


@dataclass(frozen=True, slots=True)
class TargetOptions:
    address: Address
    api_key: str | None
    model: str | None
    vocab_size: int | None
    timeout_s: float
    ignore_eos: bool
    temperature: float
    extra_body: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ArrivalOptions:
    """`rate` None and `concurrency` None: the trace's own times. `concurrency` alone: closed loop."""

    rate: float | None
    burstiness: float
    concurrency: int | None
    max_in_flight: int | None
    num_requests: int | None
    duration_s: float | None


@dataclass(frozen=True, slots=True)
class TraceOptions:
    path: Path
    limit: int | None
    speed: float
    jitter_s: float
    length_scale: float


@dataclass(frozen=True, slots=True)
class PrefixSharing:
    """Each request starts with the prefix of one of `groups` groups, `tokens` long; 0 tokens = nothing shared."""

    tokens: int = 0
    groups: int = 1


@dataclass(frozen=True, slots=True)
class RandomOptions:
    inputs: Lengths
    outputs: Lengths
    sharing: PrefixSharing


@dataclass(frozen=True, slots=True)
class OutputOptions:
    json: Path | None
    png: Path | None
    progress: bool
    token_times: bool


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`requests` says what is sent, `arrivals` when. The seed decides all that is random."""

    target: TargetOptions
    arrivals: ArrivalOptions
    requests: TraceOptions | RandomOptions
    warmup: int
    seed: int
    slo: Slo | None
    output: OutputOptions


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvbaton bench serve",
        description="Load test of an OpenAI-compatible completions endpoint. "
        "TTFT and E2E count from the scheduled arrival; TTFT from sending is shown beside it.",
    )
    _target_arguments(parser.add_argument_group("endpoint"))
    _arrival_arguments(parser.add_argument_group("arrivals (default: closed loop, 8 at once)"))
    _request_arguments(parser.add_argument_group("requests"))
    _output_arguments(parser.add_argument_group("results"))
    return parser


def _target_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", default="http://127.0.0.1:8000", help="endpoint (default: %(default)s)")
    group.add_argument("--model", help="model name (default: the first that /v1/models lists)")
    group.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    group.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="limit a request (default: 600)")
    group.add_argument(
        "--vocab-size", type=_count, help="use token ids below this (default: ask /tokenize for valid ids)"
    )
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument(
        "--stop-at-eos", action="store_true", help="let answers end early instead of asking for ignore_eos"
    )
    group.add_argument("--extra-body", default="{}", metavar="JSON", help="fields added to every request")


def _arrival_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rate", type=_positive, help="open loop: requests a second, Poisson unless --burstiness is given"
    )
    group.add_argument(
        "--burstiness", type=_positive, default=1.0, help="gamma shape of the gaps; below 1 comes in bursts"
    )
    group.add_argument("--concurrency", type=_count, help="closed loop: this many requests at once")
    group.add_argument(
        "--max-in-flight", type=_count, help="open loop: hold back above this many; the wait counts in TTFT"
    )
    group.add_argument(
        "--num-requests", type=_count, help=f"how many (default: {DEFAULT_REQUESTS}, or the whole trace)"
    )
    group.add_argument(
        "--duration", type=_positive, metavar="S", help="send for this long instead of a number of requests"
    )
    group.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="requests before the clock starts (default: 2)"
    )
    group.add_argument("--seed", type=int, default=0, help="decides arrivals, lengths and tokens (default: 0)")


def _request_arguments(group: argparse._ArgumentGroup) -> None:
    form = "N, LOW:HIGH, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA or choice:A,B,.."
    group.add_argument("--input-tokens", default="128", metavar="LENGTH", help=f"prompt: {form} (default: 128)")
    group.add_argument("--output-tokens", default="64", metavar="LENGTH", help="answer, same forms (default: 64)")
    group.add_argument("--prefix-tokens", type=int, default=0, metavar="N", help="shared prefix put before each prompt")
    group.add_argument(
        "--prefix-groups", type=_count, default=1, metavar="G", help="number of different shared prefixes"
    )
    group.add_argument(
        "--trace", type=Path, metavar="FILE", help="Mooncake .jsonl or Azure .csv: lengths, prefixes, times"
    )
    group.add_argument("--limit", type=_count, metavar="N", help="only the first N requests of the trace")
    group.add_argument("--speed", type=_positive, default=1.0, metavar="X", help="play the trace X times as fast")
    group.add_argument(
        "--jitter", type=float, default=0.0, metavar="S", help="move trace arrivals later by up to S seconds"
    )
    group.add_argument(
        "--length-scale", type=_positive, default=1.0, metavar="X", help="multiply the trace's lengths by X"
    )


def _output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--slo", help="limits for goodput in seconds, such as ttft=0.5,tpot=0.05")
    group.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    group.add_argument("--token-times", action="store_true", help="include every token's time in the JSON")
    group.add_argument("--png", type=Path, metavar="FILE", help="draw distributions and a timeline")
    group.add_argument("--no-progress", action="store_true", help="no progress bar")


def _positive(text: str) -> float:
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def parse_options(argv: list[str]) -> BenchOptions:
    """Options from arguments. Raises `UsageError`; argparse itself exits with status 2 on an unknown flag."""
    args = build_parser().parse_args(argv)
    try:
        return BenchOptions(
            target=_target(args),
            arrivals=_arrivals(args),
            requests=_requests(args),
            warmup=max(0, args.warmup),
            seed=args.seed,
            slo=parse_slo(args.slo) if args.slo else None,
            output=OutputOptions(args.json, args.png, not args.no_progress, args.token_times),
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _target(args: argparse.Namespace) -> TargetOptions:
    extra = orjson.loads(args.extra_body)
    if not isinstance(extra, dict):
        raise UsageError("--extra-body must be a JSON object")
    return TargetOptions(
        address=parse_url(args.url),
        api_key=args.api_key,
        model=args.model,
        vocab_size=args.vocab_size,
        timeout_s=args.timeout,
        ignore_eos=not args.stop_at_eos,
        temperature=args.temperature,
        extra_body=tuple(extra.items()),
    )


def _arrivals(args: argparse.Namespace) -> ArrivalOptions:
    if args.rate is not None and args.concurrency is not None:
        raise UsageError(
            "--rate is an open loop and --concurrency a closed one; to cap an open loop use --max-in-flight"
        )
    if args.num_requests is not None and args.duration is not None:
        raise UsageError("give --num-requests or --duration, not both")
    own_times = args.trace is not None and args.rate is None and args.concurrency is None
    closed = args.concurrency or (None if own_times or args.rate is not None else 8)
    if closed is not None and args.max_in_flight is not None:
        raise UsageError("--max-in-flight caps an open loop; a closed loop has --concurrency")
    unbounded = args.num_requests is None and args.duration is None and args.trace is None
    return ArrivalOptions(
        rate=args.rate,
        burstiness=args.burstiness,
        concurrency=closed,
        max_in_flight=args.max_in_flight,
        num_requests=DEFAULT_REQUESTS if unbounded else args.num_requests,
        duration_s=args.duration,
    )


def _requests(args: argparse.Namespace) -> TraceOptions | RandomOptions:
    if args.trace is not None:
        if args.prefix_tokens:
            raise UsageError("--prefix-tokens belongs to random prompts; a trace brings its own prefixes")
        return TraceOptions(args.trace, args.limit, args.speed, max(0.0, args.jitter), args.length_scale)
    if args.limit is not None:
        raise UsageError("--limit needs --trace; use --num-requests")
    sharing = PrefixSharing(max(0, args.prefix_tokens), args.prefix_groups)
    return RandomOptions(parse_lengths(args.input_tokens), parse_lengths(args.output_tokens), sharing)
