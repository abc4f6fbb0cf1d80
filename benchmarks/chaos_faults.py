"""The faults of the chaos soak: one at a time, at random, and undone as an operator's tools would undo it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from random import Random

from support.live_cluster import LiveCluster

KINDS = ("kill", "kill", "freeze", "cut session", "cut kv")
REPLACED_AFTER_S = (0.0, 2.0)
FREEZE_S = (1.0, 8.0)  # shorter and longer than the time after which an engine counts as gone


class Faults:
    """`happened` counts them by kind. The engine `spared` is frozen and cut, but never killed."""

    def __init__(self, cluster: LiveCluster, rng: Random, spared: str) -> None:
        self.happened: Counter[str] = Counter()
        self._cluster = cluster
        self._rng = rng
        self._spared = spared

    async def run(self, every_s: float, seconds: float) -> None:
        """A fault every `every_s`, the last one early enough to be over in `seconds`."""
        end = time.monotonic() + seconds - every_s
        at = time.monotonic()
        while at < end:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            await self._strike()
            at += every_s

    async def _strike(self) -> None:
        kind = self._rng.choice(KINDS)
        names = [name for name in self._cluster.engines if kind != "kill" or name != self._spared]
        name = self._rng.choice(names)
        engine = self._cluster.engines[name]
        self.happened[kind] += 1
        if kind == "kill":
            await asyncio.to_thread(engine.kill)
            await asyncio.sleep(self._rng.uniform(*REPLACED_AFTER_S))
            await self._cluster.replace(name)
        elif kind == "freeze":
            engine.freeze()
            await asyncio.sleep(self._rng.uniform(*FREEZE_S))
            engine.thaw()
        else:
            await asyncio.to_thread(engine.cut, kind.removeprefix("cut "))
