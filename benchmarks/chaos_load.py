"""The load of the chaos soak: requests at a fixed rate from a fixed set, each with the tokens that it must get."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from kvbaton.cluster.client.api import Overloaded
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.router.engine_info import EngineState, Role
from support.engine_process import EngineOptions
from support.live_cluster import LiveCluster, Stream, until
from support.oracle import prompts

LEAVES = 0.05  # the share of clients that go before the end
STREAM_S = 120.0


@dataclass(frozen=True)
class Case:
    request: Request
    tokens: dict[int, list[int]]


async def prepare(model: Path, seed: int) -> list[Case]:
    """Greedy cases, and sampled ones (also with several samples), by one engine that nobody disturbs."""
    greedy = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
    requests = [Request(f"greedy{i}", tuple(prompt), greedy) for i, prompt in enumerate(prompts())]
    cluster = LiveCluster(model, {Role.HYBRID: EngineOptions(dtype="bfloat16")}, {Role.HYBRID: 1})
    await cluster.start()
    rng = Random(seed)
    requests += [_sampled(i, rng) for i in range(24)]
    cases = [Case(request, await cluster.stream(request).end()) for request in requests]
    await cluster.stop()
    return cases


def _sampled(number: int, rng: Random) -> Request:
    prompt = tuple(rng.randrange(5, 200) for _ in range(rng.choice((20, 60, 150, 300, 450))))
    n = rng.choice((1, 1, 1, 3))
    sampling = SamplingParams(
        rng.choice((1, 8, 32, 64)),
        seed=number,
        temperature=0.9,
        top_p=0.95,
        frequency_penalty=0.2,
        n=n,
        ignore_eos=True,
    )
    return Request(f"sampled{number}", prompt, sampling, tuple(range(n)))


class Load:
    """`counts`: finished, left, refused, lost, wrong."""

    def __init__(self, cluster: LiveCluster, cases: list[Case], rate: float, rng: Random) -> None:
        self.counts: Counter[str] = Counter(finished=0, left=0, refused=0, lost=0, wrong=0)
        self.failures: list[str] = []
        self._cluster = cluster
        self._cases = cases
        self._rate = rate
        self._rng = rng
        self._serial = 0
        self._running: set[asyncio.Task[None]] = set()

    async def warm_every_pair(self) -> None:
        """A long prompt from each prefill to each decode engine: every connection exists when they are counted."""
        engines = self._cluster.engines
        long = max(self._cases, key=lambda case: len(case.request.prompt))
        for prefill in [name for name in engines if name.startswith("prefill")]:
            for decode in [name for name in engines if name.startswith("decode")]:
                for name, engine in engines.items():
                    state = EngineState.READY if name in (prefill, decode) else EngineState.DRAINING
                    await asyncio.to_thread(engine.announce, state)
                await until(lambda: self._num_ready() == 2, "one pair takes requests")
                salted = replace(long.request, request_id=f"warm-{prefill}-{decode}", cache_salt=f"{prefill}-{decode}")
                await self._cluster.stream(salted).end()
        for engine in engines.values():
            await asyncio.to_thread(engine.announce, EngineState.READY)
        await self._cluster.until_connected()

    def _num_ready(self) -> int:
        return sum(info.state is EngineState.READY for info in self._cluster.router.engines)

    async def run(self, seconds: float) -> None:
        started = time.monotonic()
        first = self._serial
        while (due := (self._serial - first) / self._rate) < seconds:
            await asyncio.sleep(max(0.0, started + due - time.monotonic()))
            case = self._rng.choice(self._cases)
            task = asyncio.create_task(self._serve(case, self._rng.random() < LEAVES))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self._serial += 1

    async def finish(self) -> None:
        """Until the last stream has ended."""
        await asyncio.gather(*self._running)

    async def _serve(self, case: Case, leaves: bool) -> None:
        request = replace(case.request, request_id=f"{case.request.request_id}-{self._serial}")
        stream = self._cluster.stream(request)
        if leaves:
            await asyncio.sleep(self._rng.uniform(0.0, 0.3))
            stream.leave()
        self.counts[await self._outcome(case, stream, leaves)] += 1

    async def _outcome(self, case: Case, stream: Stream, leaves: bool) -> str:
        try:
            tokens = await stream.end(STREAM_S)
        except Overloaded:
            return "refused"
        except Exception as error:
            self.failures.append(f"{stream.request.request_id}: {type(error).__name__}: {error}")
            return "lost"
        if leaves:
            right = all(tokens[sample] == whole[: len(tokens[sample])] for sample, whole in case.tokens.items())
        else:
            right = tokens == case.tokens
        if not right:
            self.failures.append(f"{stream.request.request_id}: {tokens} instead of {case.tokens}")
        return ("left" if leaves else "finished") if right else "wrong"
