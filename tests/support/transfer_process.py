"""One engine's transfer side in a process of its own, for tests: an agent on its thread over real UCX.

Reads JSON commands on stdin, answers each with a JSON line on the pipe that the parent passes as `answers_fd`: UCX
writes its log to stdout. Its memory holds bytes that the parent can predict, so that
the parent checks contents by position and hash without sharing memory.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time

import numpy as np

from kvbaton.kvtransfer.agent import TransferAgent
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.messages import (
    Event,
    Failed,
    Granted,
    HandoffKey,
    Landed,
    Landing,
    Offer,
    Offered,
    PeerAddress,
    Released,
)
from kvbaton.kvtransfer.ucx import UcxTransport
from support.transfer_rig import FIELDS, SECRET, ByteBlocks


def pattern(seed: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def describe(event: Event) -> list[object]:
    match event:
        case Offered():
            return ["offered", event.offer.key.request_id, event.offer.num_blocks]
        case Granted():
            return ["granted", event.key.request_id, event.first_block]
        case Landed():
            return ["landed", event.key.request_id, event.payload.decode()]
        case Released():
            return ["released", event.key.request_id, event.acked]
        case Failed():
            return ["failed", event.key.request_id, event.reason]


class Side:
    """The agent and what it has reported."""

    def __init__(self, name: str, num_blocks: int, block_bytes: int, seed: int, lease_s: float) -> None:
        self.memory = ByteBlocks(num_blocks, block_bytes)
        self.memory.array[:] = pattern(seed, self.memory.array.shape)
        self.events: queue.Queue[Event] = queue.Queue()
        transport = UcxTransport(self.memory)
        self.agent = TransferAgent(
            memory=self.memory,
            identity=PeerAddress(name, 1, transport.host, transport.port),
            transport=transport,
            secret=SECRET,
            compatibility=FIELDS,
            settings=TransferConfig(lease_s=lease_s),
            on_event=self.events.put,
            clock=time.monotonic,
        )
        self.agent.start()

    def do(self, command: dict[str, object]) -> object:
        key = HandoffKey(str(command.get("key", "")), 0)
        blocks = [int(b) for b in command.get("blocks", ())]  # type: ignore[attr-defined]
        match command["do"]:
            case "offer":
                peer = PeerAddress(str(command["peer"]), 1, "127.0.0.1", int(str(command["port"])))
                self.agent.offer(Offer(key, 0, int(str(command["num_blocks"]))), peer)
            case "ready":
                self.agent.blocks_ready(key, blocks)
            case "finish":
                self.agent.finish(key, b"payload of " + key.request_id.encode())
            case "grant":
                self.agent.grant(key, Landing(int(str(command["first"])), tuple(blocks)))
            case "ack":
                self.agent.ack(key)
            case "cancel":
                self.agent.cancel(key, str(command["reason"]))
            case "event":
                return describe(self.events.get(timeout=float(str(command["within_s"]))))
            case "digests":
                return [self.memory.digest(b) for b in blocks]
            case "stats":
                stats = self.agent.stats()
                held = [stats.sending, stats.receiving, stats.quarantined_blocks]
                return {"held": held, "peers": [p.transports for p in stats.peers], "bytes": stats.bytes_received}
            case "files":
                return len(os.listdir("/proc/self/fd"))
            case "cpu":
                return time.process_time()
            case "close":
                self.agent.close()
        return None


def main() -> None:
    arguments = json.loads(sys.argv[1])
    answers = os.fdopen(arguments.pop("answers_fd"), "w")
    side = Side(**arguments)
    answers.write(json.dumps(side.agent.address().port) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(side.do(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
