"""Strangers on the real socket: garbage, giants, silence and floods cost a socket each and disturb nobody."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("ucxx", reason="the ucxx package is not installed")

from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.messages import Landed, Landing, Offered, Released
from kvbaton.kvtransfer.ucx import UcxTransport
from support.transfer_rig import ByteBlocks, Engine, EngineOptions, Rig, key, kinds, offer, poll_until

pytestmark = pytest.mark.ucx


def ucx_engine(rig: Rig, name: str, options: EngineOptions) -> Engine:
    memory = ByteBlocks(options.num_blocks, options.block_bytes)
    transport = UcxTransport(memory)
    transport.open()
    return rig.add(name, options, memory, transport)


@pytest.fixture
def pair() -> Iterator[tuple[Rig, Engine, Engine]]:
    rig = Rig()  # its hand-moved clock: no timer fires by itself
    options = EngineOptions(settings=TransferConfig(max_strangers=4))
    prefill, decode = ucx_engine(rig, "p", options), ucx_engine(rig, "d", options)
    prefill.memory.fill(1)
    yield rig, prefill, decode
    prefill.agent.close()
    decode.agent.close()


def hand_off(prefill: Engine, decode: Engine, name: str) -> None:
    """A whole hand-off between the honest ones."""
    agents = [prefill.agent, decode.agent]
    prefill.agent.offer(offer(2, name), decode.agent.address())
    poll_until(agents, lambda: Offered in kinds(decode.events))
    decode.agent.grant(key(name), Landing(0, (20, 21)))
    prefill.agent.blocks_ready(key(name), [1, 2])
    prefill.agent.finish(key(name), b"p")
    poll_until(agents, lambda: Landed in kinds(decode.events))
    decode.agent.ack(key(name))
    poll_until(agents, lambda: Released(key(name), True) in prefill.events)
    assert [decode.memory.digest(b) for b in (20, 21)] == [prefill.memory.digest(b) for b in (1, 2)]
    prefill.take(), decode.take()


def connect(engine: Engine) -> socket.socket:
    sock = socket.create_connection((engine.transport.host, engine.transport.port))
    sock.setblocking(False)
    return sock


def closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "giant": (1 << 31).to_bytes(4, "big") + b"x",
    "zeros": bytes(64),
    "random": (200).to_bytes(4, "big") + os.urandom(200),
    "bomb": (60_000).to_bytes(4, "big") + b"\x91" * 60_000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_and_the_honest_peers_work_on(pair: tuple[Rig, Engine, Engine], name: str) -> None:
    _, prefill, decode = pair
    hand_off(prefill, decode, "before")
    with connect(decode) as stranger:
        stranger.sendall(GARBAGE[name])
        poll_until([decode.agent], lambda: closed(stranger))
    hand_off(prefill, decode, "after")
    assert decode.take() == []
    assert len(decode.agent.stats().peers) == 1


def test_a_silent_stranger_is_dropped_after_connect_s(pair: tuple[Rig, Engine, Engine]) -> None:
    rig, _, decode = pair
    with connect(decode) as stranger:
        files = open_files()
        poll_until([decode.agent], lambda: open_files() == files + 1)  # accepted
        assert not closed(stranger)
        rig.clock.now += 5.5
        poll_until([decode.agent], lambda: closed(stranger))
        assert open_files() == files


def test_a_flood_of_connections_is_capped_and_makes_no_ucx_worker(pair: tuple[Rig, Engine, Engine]) -> None:
    rig, prefill, decode = pair
    hand_off(prefill, decode, "before")
    files = open_files()
    flood = [connect(decode) for _ in range(20)]
    poll_until([decode.agent], lambda: sum(closed(s) for s in flood) == 16)
    assert open_files() == files + 20 + 4  # both ends of the admitted, no worker behind them
    hand_off(prefill, decode, "during")
    rig.clock.now += 5.5
    poll_until([decode.agent], lambda: all(closed(s) for s in flood))
    for sock in flood:
        sock.close()
    hand_off(prefill, decode, "after")


def test_sessions_come_and_go_without_a_leaked_file(pair: tuple[Rig, Engine, Engine]) -> None:
    rig, _, decode = pair
    counts = []
    for generation in range(2, 8):
        other = ucx_engine(rig, "p", EngineOptions(generation=generation))
        other.memory.fill(1)
        hand_off(other, decode, f"g{generation}")
        other.agent.close()
        poll_until([decode.agent], lambda: not decode.agent.stats().peers)
        counts.append(open_files())
    assert len(set(counts[1:])) == 1, counts


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_agent_on_its_own_thread_hands_off_and_stops() -> None:
    """start, commands from this thread, events on the agent's, close: and a bug in a command strands nothing."""
    rig = Rig()
    rig.clock = time.monotonic  # type: ignore[assignment]
    memories = [ByteBlocks(8, 4096), ByteBlocks(8, 4096)]
    prefill = rig.add("p", EngineOptions(), memories[0], UcxTransport(memories[0]))
    decode = rig.add("d", EngineOptions(), memories[1], UcxTransport(memories[1]))
    prefill.memory.fill(1)
    prefill.agent.start()
    decode.agent.start()
    prefill.agent.offer(offer(2), decode.agent.address())
    wait_for(lambda: Offered in kinds(decode.events))
    decode.agent.grant(key(), Landing(0, (3, 4)))
    prefill.agent.blocks_ready(key(), [1, 2])
    prefill.agent.finish(key(), b"p")
    wait_for(lambda: Landed in kinds(decode.events))
    decode.agent.ack(key())
    wait_for(lambda: Released(key(), True) in prefill.events)
    assert decode.memory.digest(4) == prefill.memory.digest(2)
    prefill.agent.offer(offer(2, "open"), decode.agent.address())
    wait_for(lambda: kinds(decode.events).count(Offered) == 2)
    prefill.agent.offer(offer(2, "to nobody"), None)  # type: ignore[arg-type]
    wait_for(lambda: Released(key("open"), False) in prefill.events)
    assert "internal error" in str(prefill.events)
    prefill.agent.close()
    decode.agent.close()
    decode.agent.close()
    rig.assert_nothing_held()
