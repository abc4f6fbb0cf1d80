"""Two real processes over real UCX: blocks land by position, and a peer that dies or freezes strands nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ucxx", reason="the ucxx package is not installed")

from support.transfer_process import pattern
from support.transfer_rig import ByteBlocks

pytestmark = pytest.mark.ucx

TESTS = Path(__file__).resolve().parent.parent
BLOCK_BYTES = 1 << 20
NUM_BLOCKS = 48


class Peer:
    """A transfer_process child."""

    def __init__(self, name: str, seed: int, tls: str, lease_s: float = 10.0) -> None:
        self.name, self.seed = name, seed
        read_end, write_end = os.pipe()
        arguments = {
            "answers_fd": write_end,
            "name": name,
            "num_blocks": NUM_BLOCKS,
            "block_bytes": BLOCK_BYTES,
            "seed": seed,
            "lease_s": lease_s,
        }
        paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "UCX_TLS": tls, "PYTHONPATH": os.pathsep.join(paths)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.transfer_process", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            text=True,
            env=env,
            pass_fds=(write_end,),
        )
        os.close(write_end)
        self._answers = os.fdopen(read_end)
        self.port = self._answer()

    def do(self, what: str, key: str = "r", **more: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, "key": key, **more}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def event(self, within_s: float = 30.0) -> list[Any]:
        event: list[Any] = self.do("event", within_s=within_s)
        return event

    def _answer(self) -> Any:
        line = self._answers.readline()
        assert line, f"{self.name} ended with {self.process.wait()}"
        return json.loads(line)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self._answers):
            if pipe is not None:
                pipe.close()


StartPeer = Callable[..., Peer]


@pytest.fixture
def start() -> Iterator[StartPeer]:
    peers: list[Peer] = []

    def make(*args: Any, **kwargs: Any) -> Peer:
        peers.append(Peer(*args, **kwargs))
        return peers[-1]

    yield make
    for peer in peers:
        peer.stop()


def offer(prefill: Peer, decode: Peer, key: str, num_blocks: int) -> None:
    prefill.do("offer", key, peer=decode.name, port=decode.port, num_blocks=num_blocks)
    assert decode.event() == ["offered", key, num_blocks]


def expected_digests(seed: int, blocks: list[int]) -> list[str]:
    memory = ByteBlocks(NUM_BLOCKS, BLOCK_BYTES)
    memory.array[:] = pattern(seed, memory.array.shape)
    return [memory.digest(b) for b in blocks]


def until_nothing_held(peer: Peer, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while (held := peer.do("stats")["held"]) != [0, 0, 0]:
        assert time.monotonic() < end, held


@pytest.mark.parametrize(("tls", "expected"), [("all", "memory"), ("tcp", "tcp/lo")])
def test_blocks_land_where_they_were_granted_and_nowhere_else(start: StartPeer, tls: str, expected: str) -> None:
    prefill, decode = start("p", 1, tls), start("d", 2, tls)
    source = list(np.random.default_rng(5).permutation(NUM_BLOCKS))[:20]
    landing = list(np.random.default_rng(6).permutation(NUM_BLOCKS))[:17]
    source, landing = [int(b) for b in source], [int(b) for b in landing]
    offer(prefill, decode, "r", 20)
    prefill.do("ready", blocks=source[:5])
    decode.do("grant", first=3, blocks=landing)
    assert prefill.event() == ["granted", "r", 3]
    prefill.do("ready", blocks=source[5:])
    prefill.do("finish")
    assert decode.event() == ["landed", "r", "payload of r"]
    assert decode.do("digests", blocks=landing) == expected_digests(1, source[3:])
    untouched = [b for b in range(NUM_BLOCKS) if b not in landing]
    assert decode.do("digests", blocks=untouched) == expected_digests(2, untouched)
    decode.do("ack")
    assert prefill.event() == ["released", "r", True]
    stats = decode.do("stats")
    assert stats["bytes"] == 17 * BLOCK_BYTES
    assert expected in stats["peers"][0]
    assert "eth" not in stats["peers"][0]  # a loopback engine opens no socket to the outside
    for peer in (prefill, decode):
        until_nothing_held(peer)


def in_mid_flight(prefill: Peer, decode: Peer) -> None:
    """Half of the granted blocks have been sent; the prompt is still computing."""
    offer(prefill, decode, "r", 32)
    decode.do("grant", first=0, blocks=list(range(32)))
    assert prefill.event()[0] == "granted"
    prefill.do("ready", blocks=list(range(16)))


@pytest.mark.parametrize("tls", ["all", "tcp"])
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_peer_releases_the_other_at_once_and_is_met_afresh(start: StartPeer, victim: str, tls: str) -> None:
    prefill, decode = start("p", 1, tls), start("d", 2, tls)
    in_mid_flight(prefill, decode)
    dead, alive = (prefill, decode) if victim == "prefill" else (decode, prefill)
    files = alive.do("files")
    dead.process.kill()
    killed = time.monotonic()
    failed, released = alive.event(), alive.event()
    assert (failed[:2], released) == (["failed", "r"], ["released", "r", False])
    assert time.monotonic() - killed < 5  # far below any lease: the socket says it
    until_nothing_held(alive)
    assert alive.do("files") < files  # the worker and its files are gone
    again = start(dead.name, 3, tls)
    prefill, decode = (again, decode) if victim == "prefill" else (prefill, again)
    offer(prefill, decode, "next", 4)
    decode.do("grant", "next", first=0, blocks=[40, 41, 42, 43])
    prefill.do("ready", "next", blocks=[1, 2, 3, 4])
    prefill.do("finish", "next")
    assert decode.event() == ["landed", "next", "payload of next"]
    assert decode.do("digests", blocks=[40, 41, 42, 43]) == expected_digests(prefill.seed, [1, 2, 3, 4])


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_frozen_peer_costs_a_lease_and_thaws_into_a_clean_state(start: StartPeer, victim: str) -> None:
    prefill, decode = start("p", 1, "all", lease_s=1.0), start("d", 2, "all", lease_s=1.0)
    in_mid_flight(prefill, decode)
    frozen, alive = (prefill, decode) if victim == "prefill" else (decode, prefill)
    frozen.process.send_signal(signal.SIGSTOP)
    assert alive.event()[:2] == ["failed", "r"]
    assert alive.event() == ["released", "r", False]
    until_nothing_held(alive)
    frozen.process.send_signal(signal.SIGCONT)
    events = [frozen.event()]
    if events[0][0] == "granted":
        events = [frozen.event()]
    assert events[0][:2] == ["failed", "r"]
    assert frozen.event() == ["released", "r", False]
    until_nothing_held(frozen)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_cancel_in_mid_flight_keeps_the_session(start: StartPeer, side: str) -> None:
    prefill, decode = start("p", 1, "all"), start("d", 2, "all")
    in_mid_flight(prefill, decode)
    own, other = (prefill, decode) if side == "prefill" else (decode, prefill)
    own.do("cancel", reason="client left")
    assert own.event() == ["released", "r", False]
    assert other.event() == ["failed", "r", "client left"]
    assert other.event() == ["released", "r", False]
    for peer in (prefill, decode):
        until_nothing_held(peer)
        assert len(peer.do("stats")["peers"]) == 1


def test_an_idle_pair_sleeps(start: StartPeer) -> None:
    """Waiting hand-offs cost a few renewals, not a spinning core."""
    prefill, decode = start("p", 1, "all"), start("d", 2, "all")
    offer(prefill, decode, "r", 4)
    before = [p.do("cpu") for p in (prefill, decode)]
    time.sleep(1.0)
    spent = [p.do("cpu") - b for p, b in zip((prefill, decode), before, strict=True)]
    assert max(spent) < 0.3, spent
