"""What serving costs beside the model: CPU per streamed token, and the time to first token on an idle split cluster.

    python benchmarks/serving_path.py                    # a small model made on the spot, 1 prefill + 1 decode on CPU
    python benchmarks/serving_path.py --streams 32 --json docs/results/cpu-2core/serving_path.json

This process is `kvbaton serve` itself; a thread beside it measures. Load comes from `kvbaton bench serve` in a process
of its own, whose CPU is not counted.

    CPU     of ingress replicas, HAProxy and engines over the whole run of `--streams` closed-loop streams, less the CPU
            time that the engines' threads spent in forward passes, divided by the tokens that were streamed
    TTFT    one request of 16 tokens at a time, always split over both engines (`router.local_prefill_tokens` 0), from
            sending to the first token, against the time that the prefill engine spent in its forward passes
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from kvbaton.cluster.config.cluster_config import (
    ClusterConfig,
    HostingConfig,
    HttpConfig,
)
from kvbaton.cluster.launch.ports import PortClaims
from kvbaton.cluster.launch.ray_cluster import NAMESPACE
from kvbaton.cluster.launch.screen import Screen
from kvbaton.engine.config import CacheConfig, EngineConfig
from kvbaton.engine.tiny import TinySpec, make_tiny
from kvbaton.router.engine_info import Role
from kvbaton.router.placement import RouterConfig

# Large enough that a step takes longer than its tokens take to their clients: a stream then gets one token a step, as
# it does from a real model. From a smaller one, tokens of several steps travel together and cost less.
SPEC = TinySpec(layers=8, hidden=512, heads=8, kv_heads=4, head_dim=64, check=False)
READY_TIMEOUT_S = 120.0
IDLE_S = 5.0
TTFT_REQUESTS = 60
TTFT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CpuSeconds:
    """CPU used so far by each part of the serving path; `model` is the part of `engines` inside forward passes."""

    ingress: float
    haproxy: float
    engines: float
    model: float
    others: float  # Ray's own daemons, manager, Redis

    def since(self, start: CpuSeconds) -> CpuSeconds:
        mine, before = asdict(self), asdict(start)
        return CpuSeconds(**{name: mine[name] - before[name] for name in mine})

    @property
    def serving(self) -> float:
        return self.ingress + self.haproxy + self.engines - self.model


@dataclass(frozen=True, slots=True)
class StreamCost:
    streams: int
    tokens: int
    tokens_per_s: float
    together_share: float  # tokens that reached the client in one read with the one before: those cost less
    cpu_ms_per_token: float  # ingress + HAProxy + engines, less the model
    ingress_ms: float
    haproxy_ms: float
    engine_ms: float  # less the model
    model_ms: float
    idle_share_of_a_core: float  # the same processes, with nothing to do
    others_share_of_a_core: float  # Ray's daemons, manager and Redis meanwhile
    others_idle_share_of_a_core: float
    client_us_per_token: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    requests: int
    prompt_tokens: int
    ttft_p50_ms: float
    ttft_mean_ms: float
    ttft_p99_ms: float
    engine_prefill_ms: float
    above_engine_p50_ms: float


class Cluster:
    """The running cluster seen from the measuring thread."""

    def __init__(self, port: int) -> None:
        self._port = port

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.3)
        raise RuntimeError(f"the cluster was not ready after {READY_TIMEOUT_S:g} s")

    def bench(self, arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """`kvbaton bench serve` in a process of its own: its report and its rows, one a request."""
        with tempfile.NamedTemporaryFile(suffix=".json") as result:
            command = [sys.executable, "-m", "kvbaton.cluster.cli", "bench", "serve", "--no-progress", "--token-times"]
            command += ["--url", f"http://127.0.0.1:{self._port}", "--json", result.name, *arguments.split()]
            subprocess.run(command, check=True, stdout=sys.stderr)
            document = json.loads(Path(result.name).read_text())
        return document["report"], document["requests"]

    def engine_stats(self) -> list[Any]:
        import ray

        from kvbaton.cluster.pools.actors import ENGINE_PREFIX  # after the launcher has set Ray's environment

        names = [
            item["name"] for item in ray.util.list_named_actors(all_namespaces=True) if item["namespace"] == NAMESPACE
        ]
        actors = [
            ray.get_actor(name, namespace=NAMESPACE) for name in names if name.startswith(f"{ENGINE_PREFIX}engine-")
        ]
        return list(ray.get([actor.stats.remote() for actor in actors], timeout=30))

    def cpu(self) -> CpuSeconds:
        used = {"ingress": 0.0, "haproxy": 0.0, "engines": 0.0, "others": 0.0}
        for process in psutil.Process().children(recursive=True):
            try:
                times = process.cpu_times()
                used[_part(" ".join(process.cmdline()))] += times.user + times.system
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        model = sum(stats.counters.model_cpu_s for stats in self.engine_stats())
        return CpuSeconds(model=model, **used)


def _part(command: str) -> str:
    if "ServeReplica" in command:
        return "ingress"
    if "EngineActor" in command:
        return "engines"
    return "haproxy" if "haproxy" in command.partition(" ")[0] else "others"


def together_share(rows: list[dict[str, Any]]) -> float:
    gaps = [b - a for row in rows for a, b in itertools.pairwise(row["token_times_s"])]
    return sum(gap == 0 for gap in gaps) / len(gaps)


def measure_streams(cluster: Cluster, streams: int, tokens: int) -> StreamCost:
    load = f"--concurrency {streams} --input-tokens 128 --output-tokens {tokens}"
    cluster.bench(f"{load} --num-requests {streams} --seed 1")  # code paths, allocator and caches are warm after it
    before = cluster.cpu()
    time.sleep(IDLE_S)
    idle = cluster.cpu().since(before)
    before, started = cluster.cpu(), time.monotonic()
    report, rows = cluster.bench(f"{load} --num-requests {3 * streams} --seed 2")
    used, elapsed_s = cluster.cpu().since(before), time.monotonic() - started
    summary = report["summary"]
    count = summary["tokens"]["output"]
    if summary["failed"] or count != 3 * streams * tokens:
        raise RuntimeError(f"the load did not complete: {summary['errors']}, {count} tokens")
    return StreamCost(
        streams=streams,
        tokens=count,
        tokens_per_s=summary["throughput"]["output_tokens_per_s"],
        together_share=together_share(rows),
        cpu_ms_per_token=1000 * used.serving / count,
        ingress_ms=1000 * used.ingress / count,
        haproxy_ms=1000 * used.haproxy / count,
        engine_ms=1000 * (used.engines - used.model) / count,
        model_ms=1000 * used.model / count,
        idle_share_of_a_core=idle.serving / IDLE_S,
        others_share_of_a_core=used.others / elapsed_s,
        others_idle_share_of_a_core=idle.others / IDLE_S,
        client_us_per_token=report["client"]["cpu_us_per_token"],
    )


def measure_first_token(cluster: Cluster) -> FirstToken:
    load = f"--concurrency 1 --input-tokens {TTFT_TOKENS} --output-tokens 8"
    cluster.bench(f"{load} --num-requests 20 --seed 3")
    before = _prefill_model_s(cluster)
    report, _ = cluster.bench(f"{load} --num-requests {TTFT_REQUESTS} --warmup 0 --seed 4")
    engine_ms = 1000 * (_prefill_model_s(cluster) - before) / TTFT_REQUESTS
    ttft = report["summary"]["latency"]["ttft_sent"]
    return FirstToken(
        requests=TTFT_REQUESTS,
        prompt_tokens=TTFT_TOKENS,
        ttft_p50_ms=1000 * ttft["p50"],
        ttft_mean_ms=1000 * ttft["mean"],
        ttft_p99_ms=1000 * ttft["p99"],
        engine_prefill_ms=engine_ms,
        above_engine_p50_ms=1000 * ttft["p50"] - engine_ms,
    )


def _prefill_model_s(cluster: Cluster) -> float:
    """Wall time in forward passes of the prefill engines, which in this load compute nothing but prompts."""
    return sum(stats.counters.model_s for stats in cluster.engine_stats() if stats.info.role is Role.PREFILL)


@dataclass(slots=True)
class Result:
    """What the measuring thread leaves for the main one."""

    streams: StreamCost | None = None
    first_token: FirstToken | None = None
    error: str = ""


def measure(cluster: Cluster, args: argparse.Namespace, result: Result) -> None:
    """Runs beside the launcher and ends it as Ctrl-C would."""
    try:
        cluster.wait_ready()
        result.first_token = measure_first_token(cluster)
        result.streams = measure_streams(cluster, args.streams, args.tokens)
    except Exception as error:  # the launcher must end whatever happened; the text is the program's failure
        result.error = f"{type(error).__name__}: {error}"
    finally:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def configuration(args: argparse.Namespace, model: Path, port: int) -> ClusterConfig:
    # One thread an engine: then a forward pass's CPU time is that of the thread that runs it.
    return replace(
        ClusterConfig(),
        hosting=HostingConfig(args.device),
        engine=EngineConfig(model, threads=1, cache=CacheConfig(kv_memory_bytes=args.kv_memory)),
        router=RouterConfig(local_prefill_max_tokens=0),
        http=HttpConfig(port=port),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: a small model made on the spot)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv-memory", type=int, default=256 << 20, metavar="BYTES")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a stream")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    from kvbaton.cluster.launch.launch import serve
    from kvbaton.cluster.launch.stop_signals import StopSignals

    result = Result()
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or Path(scratch) / "tiny"
        if args.model is None:
            make_tiny(model, SPEC)
        with closing(PortClaims()) as claims:
            (port,) = claims.free(1)
        thread = threading.Thread(target=measure, args=(Cluster(port), args, result), daemon=True)
        thread.start()
        with StopSignals() as signals:
            serve(configuration(args, model, port), Screen(Console(stderr=True, highlight=False)), signals)
    if result.error or result.streams is None or result.first_token is None:
        sys.exit(result.error or "the cluster did not start")
    document = {
        "command": f"python benchmarks/serving_path.py --streams {args.streams} --tokens {args.tokens}",
        "cpus": os.cpu_count(),
        "streams": asdict(result.streams),
        "first_token": asdict(result.first_token),
    }
    text = json.dumps(document, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
