"""Chaos soak: engines are killed, frozen and cut off while streams run, and every token of every stream is checked.

    PYTHONPATH=tests python benchmarks/chaos.py --minutes 10        (make chaos)

Two prefill and two decode engines in processes of their own, real UCX, real sessions, a real store; no Ray, no HTTP.
Requests come at a fixed rate and are compared token by token with what transformers (greedy) or one undisturbed engine
(sampled, several samples) says. An engine that was killed is replaced under its name, as the pool manager does it. One
engine is never killed, so that it shows what a process keeps over the whole run.

Exit code 0: nothing lost, nothing wrong, nothing leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from chaos_faults import Faults
from chaos_load import Load, prepare
from chaos_report import Report, Resources, problems, resources_of, table

from kvbaton.engine.tiny import make_tiny
from kvbaton.router.engine_info import Role
from support.engine_process import EngineOptions
from support.live_cluster import LiveCluster

ENGINES = EngineOptions(kv_memory_bytes=4 << 20, max_tokens_per_step=256, prefill_chunk_tokens=64, dtype="bfloat16")
SPARED = "prefill-1"
CALM_S = 10.0  # without faults, before and after
LEASE_S = 10.0


async def soak(args: argparse.Namespace, folder: Path) -> Report:
    prompts = await prepare(folder, args.seed)
    cluster = LiveCluster(folder, dict.fromkeys(Role, ENGINES), {Role.PREFILL: 2, Role.DECODE: 2})
    await cluster.start()
    load = Load(cluster, prompts, args.rate, Random(args.seed))
    faults = Faults(cluster, Random(args.seed + 1), SPARED)
    try:
        await load.warm_every_pair()
        before = await _calm(cluster, load)
        started = time.monotonic()
        disturbing = asyncio.create_task(faults.run(args.every, 60.0 * args.minutes))
        await load.run(60.0 * args.minutes)
        await disturbing
        await load.finish()
        seconds = time.monotonic() - started
        after = await _calm(cluster, load)
    finally:
        await cluster.stop()
    for failure in load.failures:
        print(failure, file=sys.stderr)
    return Report(seconds, dict(load.counts), dict(faults.happened), cluster.client.counters.resumed, before, after)


async def _calm(cluster: LiveCluster, load: Load) -> Resources:
    """Load without faults; then nobody may hold anything. What processes keep is measured."""
    await cluster.until_connected()
    await load.run(CALM_S)
    await load.finish()
    free_s = await cluster.seconds_until_free(LEASE_S + 2.0)
    return resources_of(cluster, free_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--every", type=float, default=15.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the report goes besides the screen")
    args = parser.parse_args()
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")
    logging.getLogger("kvbaton.cluster.client.links").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="kvbaton-chaos-") as folder:
        model = Path(folder) / "tiny"
        make_tiny(model)
        report = asyncio.run(soak(args, model))
    print(table(report))
    found = problems(report, SPARED)
    for problem in found:
        print(f"PROBLEM: {problem}")
    if args.json:
        args.json.write_text(
            json.dumps({"command": " ".join(sys.argv)} | report.as_json() | {"problems": found}, indent=1) + "\n"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
