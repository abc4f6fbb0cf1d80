"""One contract for every transport: frames in order, blocks in place, and a close in mid-flight that ends everything.

The agent relies on nothing else, so what passes here may stand under it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from kvbaton.kvtransfer.transport import Channel, Operation, Transport, TransportError
from kvbaton.kvtransfer.wire import BLOCK_TAG
from support.loopback import LoopbackNetwork, LoopbackTransport
from support.transfer_rig import ByteBlocks

MIB = 1 << 20


@dataclass
class Ends:
    """Two open transports and a channel between them, both established."""

    left_memory: ByteBlocks
    right_memory: ByteBlocks
    left_transport: Transport
    right_transport: Transport
    left: Channel
    right: Channel

    def until(self, done: Callable[[], bool], limit_s: float = 20.0) -> None:
        end = time.monotonic() + limit_s
        while not done():
            self.left_transport.progress()
            self.right_transport.progress()
            assert time.monotonic() < end, "nothing came within the limit"

    def spin(self, rounds: int = 50) -> None:
        for _ in range(rounds):
            self.left_transport.progress()
            self.right_transport.progress()

    def frames(self, channel: Channel, count: int) -> list[bytes]:
        got: list[bytes] = []

        def take() -> bool:
            while (frame := channel.receive()) is not None:
                got.append(bytes(frame))
            return len(got) >= count

        self.until(take)
        return got


def open_ends(kind: str, num_blocks: int, block_bytes: int) -> Ends:
    memories = ByteBlocks(num_blocks, block_bytes), ByteBlocks(num_blocks, block_bytes)
    memories[0].fill(1)
    if kind == "loopback":
        network = LoopbackNetwork()
        transports: list[Transport] = [LoopbackTransport(network, m) for m in memories]
    else:
        pytest.importorskip("ucxx", reason="the ucxx package is not installed")
        from kvbaton.kvtransfer.ucx import UcxTransport

        transports = [UcxTransport(m) for m in memories]
    for transport in transports:
        transport.open()
    left = transports[0].connect(transports[1].host, transports[1].port)
    accepted: list[Channel] = []
    ends = Ends(*memories, *transports, left, left)

    def arrive() -> bool:
        channel = transports[1].accept()
        if channel is not None:
            accepted.append(channel)
        return bool(accepted)

    ends.until(arrive)
    ends.right = accepted[0]
    left.send(left.local_blob())
    ends.right.send(ends.right.local_blob())
    left_blob, right_blob = ends.frames(ends.right, 1)[0], ends.frames(left, 1)[0]
    left.establish(right_blob)
    ends.right.establish(left_blob)
    return ends


KINDS = ["loopback", pytest.param("ucx", marks=pytest.mark.ucx)]


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest) -> Iterator[Callable[[int, int], Ends]]:
    made: list[Ends] = []

    def make(num_blocks: int, block_bytes: int) -> Ends:
        made.append(open_ends(request.param, num_blocks, block_bytes))
        return made[-1]

    yield make
    for ends in made:
        ends.left_transport.close()
        ends.right_transport.close()


def all_done(operations: list[Operation]) -> bool:
    return all(o.completed for o in operations)


@pytest.mark.parametrize("size", [0, 1, 4096, 65536 + 1, MIB, 16 * MIB])
def test_a_block_of_any_size_arrives_in_place(opened: Callable[[int, int], Ends], size: int) -> None:
    ends = opened(3, size)
    received = ends.right.post_receive(BLOCK_TAG + 5, 2)
    sent = ends.left.post_send(BLOCK_TAG + 5, 1)
    ends.until(lambda: all_done([received, sent]))
    assert (ends.left.failure(sent), ends.right.failure(received)) == (None, None)
    expected = np.zeros_like(ends.right_memory.array)
    expected[2] = ends.left_memory.array[1]
    assert (ends.right_memory.array == expected).all()


def test_many_in_flight_both_ways_meet_their_own_tags(opened: Callable[[int, int], Ends]) -> None:
    ends = opened(128, 20_000)
    ends.right_memory.array[:64] = ends.left_memory.array[64:]
    order = np.random.default_rng(3).permutation(64)
    operations = [ends.right.post_receive(BLOCK_TAG + i, 64 + i) for i in range(64)]
    operations += [ends.left.post_receive(BLOCK_TAG + 1000 + i, 64 + i) for i in range(64)]
    source = ends.left_memory.array[:64].copy(), ends.right_memory.array[:64].copy()
    for i in order:
        operations.append(ends.left.post_send(BLOCK_TAG + int(i), int(i)))
        operations.append(ends.right.post_send(BLOCK_TAG + 1000 + int(i), int(i)))
    ends.until(lambda: all_done(operations))
    assert (ends.right_memory.array[64:] == source[0]).all()
    assert (ends.left_memory.array[64:] == source[1]).all()


def test_an_abort_completes_a_receive_and_writes_nothing(opened: Callable[[int, int], Ends]) -> None:
    ends = opened(2, 70_000)
    received = ends.right.post_receive(BLOCK_TAG, 0)
    aborted = ends.left.post_abort(BLOCK_TAG)
    ends.until(lambda: all_done([received, aborted]))
    assert ends.right.failure(received) is None
    assert not ends.right_memory.array.any()


def test_frames_come_whole_and_in_order_beside_blocks(opened: Callable[[int, int], Ends]) -> None:
    ends = opened(8, MIB)
    receives = [ends.right.post_receive(BLOCK_TAG + i, i) for i in range(8)]
    frames = [bytes([i]) * (1 + 37 * i * i) for i in range(100)]
    sends: list[Operation] = []
    for i, frame in enumerate(frames):
        ends.left.send(frame)
        if i % 13 == 0:
            sends.append(ends.left.post_send(BLOCK_TAG + i // 13, i // 13))
    assert ends.frames(ends.right, 100) == frames
    ends.until(lambda: all_done(receives + sends))
    assert (ends.right_memory.array == ends.left_memory.array).all()


def test_a_frame_over_the_cap_loses_the_connection_unread(opened: Callable[[int, int], Ends]) -> None:
    ends = opened(1, 8)
    ends.left.send(b"x" * (3 * MIB))

    def refused() -> bool:
        assert ends.right.receive() is None
        return ends.right.lost() is not None

    ends.until(refused)
    assert "3145728" in str(ends.right.lost())


def test_a_block_that_nobody_waits_for_loses_the_connection(opened: Callable[[int, int], Ends]) -> None:
    """A correct sender only sends what was granted: anything else is refused and written nowhere."""
    ends = opened(2, 4096)
    ends.left.post_send(BLOCK_TAG + 77, 1)

    def refused() -> bool:
        assert ends.right.receive() is None
        return ends.right.lost() is not None

    ends.until(refused)
    assert "block message" in str(ends.right.lost())
    assert not ends.right_memory.array.any()


def test_a_longer_message_than_the_block_fails_the_receive(opened: Callable[[int, int], Ends]) -> None:
    ends = opened(1, 4096)
    ends.right_memory.array = np.zeros((1, 1024), np.uint8)
    received = ends.right.post_receive(BLOCK_TAG, 0)
    ends.left.post_send(BLOCK_TAG, 0)
    ends.until(lambda: received.completed)
    assert ends.right.failure(received) is not None
    assert not ends.right_memory.array.any()


@pytest.mark.parametrize("closer", ["left", "right"])
def test_a_close_in_mid_flight_ends_every_operation_and_shows_at_the_peer(
    opened: Callable[[int, int], Ends], closer: str
) -> None:
    """After close returns the blocks may be reused: they are overwritten here, and nothing writes them again."""
    ends = opened(16, 4 * MIB)
    for i in range(16):
        ends.right.post_receive(BLOCK_TAG + i, i)
        ends.left.post_send(BLOCK_TAG + i, i)
    ends.spin(3)
    closing, other = (ends.left, ends.right) if closer == "left" else (ends.right, ends.left)
    closing.close()
    closing.close()
    assert closing.receive() is None
    ends.until(lambda: other.lost() is not None)
    other.close()
    ends.left_memory.array[:] = 7
    ends.right_memory.array[:] = 9
    ends.spin()
    assert (ends.left_memory.array == 7).all()
    assert (ends.right_memory.array == 9).all()


def test_a_connection_to_nobody_is_lost_with_a_reason(opened: Callable[[int, int], Ends]) -> None:
    ends = opened(1, 8)
    port = ends.right_transport.port
    ends.right_transport.close()
    channel = ends.left_transport.connect(ends.right_transport.host, port)
    end = time.monotonic() + 10

    def gone() -> bool:
        ends.left_transport.progress()
        channel.receive()
        assert time.monotonic() < end
        return channel.lost() is not None

    while not gone():
        pass
    assert "refused" in str(channel.lost()).lower()


def test_wake_ends_a_wait_from_another_thread(opened: Callable[[int, int], Ends]) -> None:
    import threading

    ends = opened(1, 8)
    waiter = threading.Thread(target=ends.left_transport.wait, args=(60.0,))
    waiter.start()
    ends.left_transport.wake()
    waiter.join(timeout=20)
    assert not waiter.is_alive()


def test_an_idle_wait_ends_when_a_frame_arrives(opened: Callable[[int, int], Ends]) -> None:
    """No polling: the sleeper is woken by the transport itself."""
    import threading

    ends = opened(1, 8)
    ends.spin()
    got: list[bytes] = []

    def sleep_until_frame() -> None:
        while not got:
            ends.right_transport.progress()
            if (frame := ends.right.receive()) is not None:
                got.append(bytes(frame))
            else:
                ends.right_transport.wait(60.0)

    waiter = threading.Thread(target=sleep_until_frame)
    waiter.start()
    ends.left.send(b"hello")
    end = time.monotonic() + 20
    while waiter.is_alive() and time.monotonic() < end:
        ends.left_transport.progress()
    waiter.join(timeout=1)
    assert got == [b"hello"]


def test_a_port_in_use_is_named() -> None:
    from kvbaton.kvtransfer.ucx import UcxTransport

    pytest.importorskip("ucxx", reason="the ucxx package is not installed")
    first = UcxTransport(ByteBlocks(1, 8))
    with pytest.raises(TransportError, match=f"127.0.0.1:{first.port}"):
        UcxTransport(ByteBlocks(1, 8), port=first.port)
    first.close()
