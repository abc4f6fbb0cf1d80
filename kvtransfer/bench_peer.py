"""One side of the transfer benchmark in a process of its own: a real agent over real UCX, told what to do on stdin.

Commands and answers are JSON lines: open (memory and agent), run (prefill side: hand-offs to a peer, timed), close.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvbaton.kvtransfer.agent import TransferAgent
from kvbaton.kvtransfer.config import Checksum, TransferConfig
from kvbaton.kvtransfer.messages import (
    Event,
    Failed,
    HandoffKey,
    Landed,
    Landing,
    Offer,
    Offered,
    PeerAddress,
    Released,
)
from kvbaton.kvtransfer.ucx import UcxTransport

_SECRET = b"transfer benchmark"
_WARMUP = 2


class HostBlocks:
    """BlockMemory over one array of host memory, touched once so that every page exists."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._array = np.ones((num_blocks, block_bytes), np.uint8)

    @property
    def num_blocks(self) -> int:
        return int(self._array.shape[0])

    @property
    def block_bytes(self) -> int:
        return int(self._array.shape[1])

    def block(self, block_id: int) -> memoryview:
        return memoryview(self._array[block_id])


def make_agent(name: str, memory: HostBlocks, checksum: Checksum, on_event: Callable[[Event], None]) -> TransferAgent:
    transport = UcxTransport(memory)
    identity = PeerAddress(name, 1, transport.host, transport.port)
    settings = TransferConfig(checksum=checksum)
    agent = TransferAgent(memory, identity, transport, _SECRET, (), settings, on_event, time.monotonic)
    agent.start()
    return agent


class DecodeSide:
    """Grants every offer into the next blocks of the pool, in turn, and acknowledges what has landed."""

    def __init__(self, memory: HostBlocks, checksum: Checksum) -> None:
        self._memory = memory
        self._next = 0
        self.agent = make_agent("decode", memory, checksum, self._on_event)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Offered):
            first, count = self._next, event.offer.num_blocks
            self._next = (first + count) % self._memory.num_blocks
            blocks = tuple((first + i) % self._memory.num_blocks for i in range(count))
            self.agent.grant(event.offer.key, Landing(0, blocks))
        elif isinstance(event, Landed):
            self.agent.ack(event.key)


@dataclass(frozen=True, slots=True)
class Load:
    """`handoffs` timed hand-offs of `blocks_each` blocks after `warmup` others, `concurrent` of them open at a time."""

    warmup: int
    handoffs: int
    blocks_each: int
    concurrent: int


class PrefillSide:
    """Hands off as fast as the peer takes it, all on the agent's thread as an engine's events would drive it."""

    def __init__(self, memory: HostBlocks, checksum: Checksum) -> None:
        self._memory = memory
        self._finished = threading.Event()
        self._failure = ""
        self._started = 0
        self._released = 0
        self._load = Load(0, 0, 0, 0)
        self._timed_from = 0.0
        self._timed_until = 0.0
        self._peer = PeerAddress("", 0, "", 0)
        self.agent = make_agent("prefill", memory, checksum, self._on_event)

    def run(self, peer: PeerAddress, load: Load) -> float:
        """Seconds from the release that ends the warm-up to the last one, as perftest's clock runs."""
        self._peer, self._load = peer, load
        self._started = self._released = 0
        self._finished.clear()
        for _ in range(min(load.concurrent, load.warmup + load.handoffs)):
            self._hand_off()
        self._finished.wait()
        if self._failure:
            raise RuntimeError(f"hand-off failed: {self._failure}")
        return self._timed_until - self._timed_from

    def _hand_off(self) -> None:
        count = self._load.blocks_each
        first = self._started * count
        key = HandoffKey(f"bench-{self._started}", 0)
        self._started += 1
        self.agent.offer(Offer(key, count, count), self._peer)
        self.agent.blocks_ready(key, [(first + i) % self._memory.num_blocks for i in range(count)])
        self.agent.finish(key, b"first token")

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._failure = event.reason
            self._finished.set()
        elif isinstance(event, Released):
            self._count_release(self._load.warmup + self._load.handoffs)

    def _count_release(self, total: int) -> None:
        self._released += 1
        if self._released == self._load.warmup:
            self._timed_from = time.perf_counter()
        if self._released == total:
            self._timed_until = time.perf_counter()
            self._finished.set()
        elif self._started < total:
            self._hand_off()


def main() -> int:
    side: DecodeSide | PrefillSide | None = None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # UCX writes its log to stdout
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, object] = {}
        if command["do"] == "open":
            memory = HostBlocks(command["num_blocks"], command["block_bytes"])
            make = PrefillSide if command["side"] == "prefill" else DecodeSide
            side = make(memory, command["checksum"])
            answer = {"port": side.agent.address().port}
        elif command["do"] == "run" and isinstance(side, PrefillSide):
            load = Load(_WARMUP, command["handoffs"], command["blocks_each"], command["concurrent"])
            seconds = side.run(PeerAddress("decode", 1, "127.0.0.1", command["port"]), load)
            peers = side.agent.stats().peers
            answer = {"seconds": seconds, "transports": peers[0].transports if peers else ""}
        elif command["do"] == "close" and side is not None:
            side.agent.close()
            side = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
