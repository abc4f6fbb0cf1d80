"""Attacks on both ports of running engines: refused, nothing kept, and the stream in progress never notices."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.cluster.session.messages import HelloMessage, ProofMessage
from kvbaton.cluster.session.wire import PROTOCOL_VERSION, Encoder
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.engine.tiny import Family
from kvbaton.kvtransfer.handshake import Handshake, Hello
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo
from support.engine_process import SECRET, EngineOptions
from support.local_cluster import LocalCluster
from support.oracle import TinyModels, oracle_tokens, prompts

pytestmark = [pytest.mark.ucx, pytest.mark.asyncio(loop_scope="module")]


def framed(body: bytes) -> bytes:
    """Both planes put a length of four bytes before each frame."""
    return len(body).to_bytes(4, "big") + body


def bomb(depth: int) -> bytes:
    return b"\x91" * depth + b"\x00"


ATTACKS = {
    "random": framed(os.urandom(300)),
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "giant": (1 << 31).to_bytes(4, "big") + bytes(1000),
    "deep": framed(bomb(1500)),
    "wide": framed(b"\xdd\xff\xff\xff\xff" + bytes(100)),
    "long string": framed(b"\x92\x01\xdb\xff\xff\xff\xff"),
    "map": framed(b"\xdf\x00\xff\xff\xff" + bytes(100)),
    "half a frame": framed(bytes(200))[:100],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tiny_model: TinyModels) -> AsyncIterator[LocalCluster]:
    oracle_tokens(tiny_model(Family.LLAMA), prompts()[-1])  # blocks the loop: before there are sessions
    options = EngineOptions(prefix_cache=False)
    async with LocalCluster(tiny_model(Family.LLAMA), options=options) as running:
        yield running


def greedy(name: str) -> Request:
    return Request(name, tuple(prompts()[-1]), SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True))


def ports(info: EngineInfo) -> tuple[int, int]:
    return info.session_port, info.kv_port


async def attack(port: int, data: bytes) -> bytes:
    """Send, and return all that comes back until the engine hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    if data == ATTACKS["half a frame"]:
        writer.write_eof()
    answer = b""
    try:
        async with asyncio.timeout(15):
            while received := await reader.read(1 << 16):
                answer += received
    except ConnectionError:
        pass  # hung up without a close
    finally:
        writer.close()
    return answer


def files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


async def steady(cluster: LocalCluster, wanted: dict[str, int]) -> None:
    def same() -> bool:
        return {name: files(engine.pid) for name, engine in cluster.engines.items()} == wanted

    await cluster.until(same, "every attacker's socket is closed")


async def test_garbage_on_both_ports_while_a_stream_runs(cluster: LocalCluster, tiny_model: TinyModels) -> None:
    expected = oracle_tokens(tiny_model(Family.LLAMA), greedy("").prompt)
    assert await cluster.tokens(greedy("before")) == {0: expected}
    kept = {name: files(engine.pid) for name, engine in cluster.engines.items()}
    for engine in cluster.engines.values():
        engine.slow_down(0.02)
    stream = asyncio.create_task(cluster.tokens(greedy("during")))
    infos = [engine.info for engine in cluster.engines.values()]
    targets = [port for info in infos if info is not None for port in ports(info)]
    await asyncio.gather(*(attack(port, data) for port in targets for data in ATTACKS.values()))
    assert not stream.done(), "the attack happened while the stream ran"
    for engine in cluster.engines.values():
        engine.slow_down(0.0)
    assert await stream == {0: expected}
    assert cluster.client.counters.resumed == 0
    await cluster.assert_clean()
    await steady(cluster, kept)


async def test_a_wrong_secret_is_refused_on_both_ports(cluster: LocalCluster) -> None:
    info = cluster.engines["decode-1"].info
    assert info is not None
    with pytest.raises(SessionLost, match="secrets differ"):
        await SessionClient(info, b"another secret", "stranger", _Nobody()).connect()
    fields = (("model", "x"),)
    hello = Hello(PeerAddress("stranger", 1, "127.0.0.1", 1), fields, b"")
    first = Handshake(b"another secret", True, lambda: hello, lambda _: None).start().send
    assert first is not None
    answer = await attack(info.kv_port, framed(first))
    assert b"do not share one cluster secret" in answer
    assert b"decode-1" not in answer, "a stranger learns nothing about the engine"


async def test_a_recorded_handshake_opens_nothing(cluster: LocalCluster) -> None:
    """Replays a valid HELLO and a proof that was valid for other nonces."""
    info = cluster.engines["decode-1"].info
    assert info is not None
    before = cluster.engines["decode-1"].stats()
    hello = Hello(PeerAddress("replayed", 1, "127.0.0.1", 1), (("model", "x"),), b"")
    first = Handshake(SECRET, True, lambda: hello, lambda _: None).start().send
    assert first is not None
    for _ in range(2):
        answer = await attack(info.kv_port, framed(first))
        assert b"incompatible engines" in answer  # authentic, but its fields do not fit
    nonce = b"n" * 32
    proof = hmac.digest(SECRET, b"an old proof", hashlib.sha256)
    greeting = Encoder().message(HelloMessage(PROTOCOL_VERSION, "stranger", nonce))
    answer = await attack(info.session_port, greeting + Encoder().message(ProofMessage(proof)))
    assert b"the cluster secrets differ" in answer
    after = cluster.engines["decode-1"].stats()
    assert (after.requests, after.transfer.receiving, after.transfer.quarantined_blocks) == (0, 0, 0)
    assert len(after.transfer.peers) == len(before.transfer.peers)


class _Nobody:
    def step(self, *_: object) -> None:
        raise AssertionError("no step for a stranger")

    def lost(self, *_: object) -> None:
        raise AssertionError("never connected")
