"""Guards checksums: a block that lands wrong is never taken for KV, a right one always is, and off costs nothing."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from kvbaton.kvtransfer.checksum import BlockSums, block_sums
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.handoff import ReceiverState
from kvbaton.kvtransfer.messages import Cause, Failed, HandoffKey, Landed, Landing, Offer, Released
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.transport import Transport
from kvbaton.kvtransfer.wire import (
    BLOCK_TAG,
    BlocksMessage,
    DoneMessage,
    FailMessage,
    GrantMessage,
    Handle,
    Message,
    SumsMessage,
    decode_frame,
)
from kvbaton.settings import ConfigError
from support.faulty_transport import Fault, FaultyTransport
from support.loopback import LoopbackTransport
from support.recording_link import RecordingLink
from support.transfer_rig import ByteBlocks, Engine, EngineOptions, Rig, key, offer

KINDS = ("xxh3", "crc32c")
HANDLE = Handle("r", 2, 7)
KEY = HandoffKey("r", 2)
SUMS = BlockSums("plain", lambda block_id: block_id * 10)  # what block 20 should hold sums to 200


# the sums themselves


def test_each_kind_gives_its_published_value() -> None:
    """Both ends of a mixed cluster must agree, so the values are the algorithms' own: RFC 3720 and xxHash's vectors."""
    memory = ByteBlocks(2, 32)
    crc, xxh = block_sums("crc32c", memory), block_sums("xxh3", memory)
    assert crc is not None
    assert xxh is not None
    assert crc.of(1) == 0x8A9136AA  # 32 bytes of zeroes
    memory.array[1] = np.arange(32)
    assert crc.of(1) == 0x46DD794E
    assert xxh.of(0) != xxh.of(1)
    assert 0 <= xxh.of(1) < 1 << 64


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_of_a_block_changes_its_sum(kind: str) -> None:
    memory = ByteBlocks(1, 64)
    memory.fill(3)
    sums = block_sums(kind, memory)
    assert sums is not None
    right = sums.of(0)
    for bit in range(64 * 8):
        memory.array[0, bit // 8] ^= 1 << bit % 8
        assert sums.of(0) != right
        memory.array[0, bit // 8] ^= 1 << bit % 8
    assert sums.of(0) == right


class GpuBlocks(ByteBlocks):
    """As a KV pool on a GPU shows itself."""

    def block(self, block_id: int) -> np.ndarray:
        class OnGpu(np.ndarray):
            __cuda_array_interface__ = {}  # noqa: RUF012

        return self.array[block_id].view(OnGpu)


@pytest.mark.parametrize("kind", KINDS)
def test_gpu_memory_is_refused_by_name(kind: str) -> None:
    assert block_sums("off", GpuBlocks(1, 64)) is None
    with pytest.raises(ConfigError, match=f"checksum {kind} is for blocks in host memory"):
        block_sums(kind, GpuBlocks(1, 64))


@pytest.mark.parametrize(("kind", "module"), [("xxh3", "xxhash"), ("crc32c", "google_crc32c")])
def test_a_missing_library_is_named_and_off_needs_none(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"checksum {kind} needs the package {module.replace('_', '-')}"):
        block_sums(kind, ByteBlocks(1, 64))
    assert block_sums("off", ByteBlocks(1, 64)) is None


def test_the_slow_fallback_of_crc32c_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a hundredfold slowdown that only shows as latency."""
    import google_crc32c

    monkeypatch.setattr(google_crc32c, "implementation", "python")
    with pytest.raises(ConfigError, match="no compiled part"):
        block_sums("crc32c", ByteBlocks(1, 64))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"transfer\.checksum: must be one of off, crc32c, xxh3, got 'md5'"):
        TransferConfig(checksum="md5")


# the state machines


def sums_sent(link: RecordingLink) -> list[SumsMessage]:
    return [message for message in link.sent if isinstance(message, SumsMessage)]


def test_sums_leave_with_the_last_queued_block_and_before_a_frame_is_full() -> None:
    """Guards against a sum that waits for a chunk that is still computing, and against a frame per block."""
    link = RecordingLink()
    sender = SendHandoff(HANDLE, Offer(KEY, 80 * 16, 80), link, lease_s=10.0, now=0.0)
    sender.on_grant(GrantMessage(HANDLE, BLOCK_TAG, 1, 79), 0.0)
    sender.blocks_ready(range(5), 0.0)
    for index in range(1, 5):
        assert sums_sent(link) == []
        sender.on_posted(index, index * 7)
    assert sums_sent(link) == [SumsMessage(HANDLE, 1, (7, 14, 21, 28))]
    sender.blocks_ready(range(5, 80), 0.0)
    for index in range(5, 80):
        sender.on_posted(index, index)
    assert [(m.first_block, len(m.sums)) for m in sums_sent(link)] == [(1, 4), (5, 32), (37, 32), (69, 11)]


def landing(announced: int = 3) -> tuple[ReceiveHandoff, RecordingLink]:
    """4 blocks, of which 1..3 go to 20, 21, 22; `announced` of them are on their way."""
    link = RecordingLink()
    link.sums = SUMS
    receiver = ReceiveHandoff(HANDLE, Offer(KEY, 64, 4), link)
    receiver.grant(Landing(1, (20, 21, 22)))
    receiver.on_blocks(BlocksMessage(HANDLE, 1, announced), 0.0)
    return receiver, link


def complete(receiver: ReceiveHandoff, link: RecordingLink, *numbers: int) -> None:
    for number in numbers:
        link.receives[number].complete()
    receiver.poll(0.0)


@pytest.mark.parametrize("last", ["sums", "blocks", "done"])
def test_landed_needs_every_sum_whatever_comes_last(last: str) -> None:
    receiver, link = landing()
    steps = {
        "sums": lambda: receiver.on_sums(SumsMessage(HANDLE, 1, (200, 210, 220)), 0.0),
        "blocks": lambda: complete(receiver, link, 0, 1, 2),
        "done": lambda: receiver.on_done(DoneMessage(HANDLE, 3, b"p"), 0.0),
    }
    for name in sorted(steps, key=lambda name: name == last):
        assert link.events == []
        steps[name]()
    assert link.events == [Landed(KEY, b"p")]


@pytest.mark.parametrize("sums_first", [True, False])
def test_a_wrong_block_fails_the_hand_off_as_soon_as_it_can_be_told(sums_first: bool) -> None:
    receiver, link = landing()
    wrong = SumsMessage(HANDLE, 1, (200, 211))
    if sums_first:
        receiver.on_sums(wrong, 0.0)
    complete(receiver, link, 0, 1)
    if not sums_first:
        assert link.events == []
        receiver.on_sums(wrong, 0.0)
    reason = "checksum mismatch in block 2: plain 00000000000000d3 sent, 00000000000000d2 landed"
    assert link.events == [Failed(KEY, reason, Cause.CHECKSUM)]
    assert link.sent[-1] == FailMessage(HANDLE, reason)
    assert receiver.state is ReceiverState.DRAINING
    complete(receiver, link, 2)
    assert link.events[1:] == [Released(KEY, acked=False)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (SumsMessage(HANDLE, 2, (210,)), "checksums of blocks 2..2, 1 is next"),
        (SumsMessage(HANDLE, 0, (190, 200)), "checksums of blocks 0..1, 1 is next"),
        (SumsMessage(HANDLE, 1, (200, 210, 220)), "checksums of blocks 1..3, 1 is next"),
    ],
)
def test_sums_of_other_blocks_than_the_next_announced_are_refused(message: SumsMessage, reason: str) -> None:
    receiver, link = landing(announced=2)
    receiver.on_sums(message, 0.0)
    assert link.events == [Failed(KEY, reason)]


def test_sums_that_were_not_agreed_are_refused() -> None:
    receiver, link = landing()
    link.sums = None
    receiver = ReceiveHandoff(HANDLE, Offer(KEY, 64, 4), link)
    receiver.grant(Landing(1, (20, 21, 22)))
    receiver.on_blocks(BlocksMessage(HANDLE, 1, 3), 0.0)
    receiver.on_sums(SumsMessage(HANDLE, 1, (200,)), 0.0)
    assert link.events == [Failed(KEY, "checksums came where none were agreed")]


def test_sums_that_never_come_stall_the_hand_off() -> None:
    receiver, link = landing()
    complete(receiver, link, 0, 1, 2)
    receiver.on_done(DoneMessage(HANDLE, 3, b"p"), 0.0)
    receiver.on_tick(29.0, stall_s=30.0)
    assert link.events == []
    receiver.on_tick(30.0, stall_s=30.0)
    assert link.events[0] == Failed(KEY, "stalled: 3 announced blocks, none came whole in 30.0 s")


# two agents


class Rot:
    """Corrupts the n-th block that lands, records every frame."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.posted = 0
        self.frames: list[bytes] = []

    def on_control(self, data: bytes) -> Fault:
        self.frames.append(data)
        return Fault.PASS

    def on_block(self, tag: int) -> Fault:
        return Fault.PASS

    def on_landing(self, tag: int) -> Fault:
        self.posted += 1
        return Fault.CORRUPT if self.posted == self.number else Fault.PASS


def pair(plan: Rot, checksum: str, at_decode: str = "") -> tuple[Rig, Engine, Engine]:
    rig = Rig()

    def wrap(transport: Transport) -> Transport:
        assert isinstance(transport, LoopbackTransport)
        return FaultyTransport(transport, plan, transport.memory)

    rig.wrap = wrap
    options = EngineOptions(settings=TransferConfig(checksum=checksum), num_blocks=80)
    prefill = rig.engine("p", options)
    decode_settings = replace(options.settings, checksum=at_decode or checksum)
    decode = rig.engine("d", replace(options, settings=decode_settings))
    prefill.memory.fill(1)
    return rig, prefill, decode


def hand_off(rig: Rig, prefill: Engine, decode: Engine, name: str, num_blocks: int) -> None:
    prefill.agent.offer(offer(num_blocks, name), decode.agent.address())
    rig.settle()
    decode.agent.grant(key(name), Landing(1, tuple(range(num_blocks, 1, -1))))
    prefill.agent.blocks_ready(key(name), range(3))
    rig.settle()
    prefill.agent.blocks_ready(key(name), range(3, num_blocks))
    prefill.agent.finish(key(name), b"payload")
    rig.settle()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_blocks", [4, 70])
def test_what_was_sent_lands_and_nothing_is_counted(kind: str, num_blocks: int) -> None:
    rig, prefill, decode = pair(Rot(), kind)
    hand_off(rig, prefill, decode, "r", num_blocks)
    assert Landed(key(), b"payload") in decode.events
    landed = [decode.memory.digest(b) for b in range(num_blocks, 1, -1)]
    assert landed == [prefill.memory.digest(b) for b in range(1, num_blocks)]
    decode.agent.ack(key())
    rig.settle()
    assert prefill.events[-1] == Released(key(), acked=True)
    assert decode.agent.stats().checksum_failures == 0
    rig.assert_nothing_held()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_corrupted_block_fails_both_sides_by_name_and_the_session_lives_on(kind: str, number: int) -> None:
    rig, prefill, decode = pair(Rot(number), kind)
    hand_off(rig, prefill, decode, "r", 4)
    for engine in (prefill, decode):
        failed = [event for event in engine.take() if isinstance(event, Failed | Landed | Released)]
        assert [type(event) for event in failed] == [Failed, Released]
        assert isinstance(failed[0], Failed)
        assert failed[0].reason.startswith(f"checksum mismatch in block {number}: {kind} ")
    assert (prefill.agent.stats().checksum_failures, decode.agent.stats().checksum_failures) == (0, 1)
    rig.assert_nothing_held()
    hand_off(rig, prefill, decode, "again", 4)
    assert Landed(key("again"), b"payload") in decode.events
    decode.agent.abandon("the end")
    assert decode.agent.stats().checksum_failures == 1  # outlives its session


def test_without_checksums_a_corrupted_block_lands_unseen_and_nothing_is_spent() -> None:
    """Off costs nothing: no frame more, no block read; and this is what the tests above would see without the check."""
    plan = Rot(2)
    rig, prefill, decode = pair(plan, "off")
    reads: list[int] = []
    for engine in (prefill, decode):
        engine.memory.block = lambda b, read=engine.memory.block: (reads.append(b), read(b))[1]  # type: ignore[method-assign]
    hand_off(rig, prefill, decode, "r", 4)
    assert Landed(key(), b"payload") in decode.events
    assert decode.memory.digest(3) != prefill.memory.digest(2)
    assert len(reads) == 2 * 3 + 1  # the network's own copy of each block, and the fault
    kinds = {type(message) for message in messages_in(plan.frames)}
    assert DoneMessage in kinds
    assert SumsMessage not in kinds


def messages_in(frames: list[bytes]) -> list[Message]:
    """Those of the open session: a handshake's frames begin with a word."""
    return [decode_frame(frame, 1 << 20).message for frame in frames if b"kvbaton" not in frame[:16]]


def test_engines_that_disagree_refuse_each_other_and_name_the_field() -> None:
    rig, prefill, decode = pair(Rot(), "xxh3", at_decode="off")
    prefill.agent.offer(offer(4), decode.agent.address())
    rig.settle()
    failed = prefill.events[0]
    assert isinstance(failed, Failed)
    assert "kvtransfer.checksum is 'off' here and 'xxh3' at the peer" in failed.reason
