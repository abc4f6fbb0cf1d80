"""Guards the table of open hand-offs: no key twice on a side, no block with two writers, ends counted by their kind."""

from __future__ import annotations

import pytest

from kvbaton.kvtransfer.messages import Cause, Event, Failed, HandoffCounts, Released
from kvbaton.kvtransfer.open_handoffs import LandingBlocks, OpenHandoffs
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.wire import Handle
from support.recording_link import RecordingLink
from support.transfer_rig import ByteBlocks, key, offer


def table() -> tuple[OpenHandoffs, list[Event]]:
    events: list[Event] = []
    return OpenHandoffs(ByteBlocks(8, 64), None, events.append), events


def receiver(serial: int) -> ReceiveHandoff:
    return ReceiveHandoff(Handle("r", 0, serial), offer(2), RecordingLink())


def test_a_key_is_received_once_at_a_time() -> None:
    handoffs, _ = table()
    first = receiver(1)
    assert handoffs.add_receiver(first)
    assert not handoffs.add_receiver(receiver(2))
    assert handoffs.receivers == {key(): first}
    handoffs.forget(Handle("r", 0, 2))
    assert handoffs.receivers == {key(): first}, "the end of another hand-off of the same key"
    handoffs.forget(Handle("r", 0, 1))
    assert handoffs.receivers == {}


def test_a_hand_off_to_oneself_ends_on_each_side_by_its_own_handle() -> None:
    handoffs, _ = table()
    sender = handoffs.senders[key()] = SendHandoff(Handle("r", 0, 1), offer(2), RecordingLink(), 10.0, 0.0)
    handoffs.add_receiver(receiver(2))
    handoffs.forget(Handle("r", 0, 2))
    assert (handoffs.senders, handoffs.receivers) == ({key(): sender}, {})
    handoffs.forget(Handle("r", 0, 1))
    assert handoffs.senders == {}


def test_the_end_of_a_hand_off_frees_the_blocks_that_it_wrote() -> None:
    handoffs, _ = table()
    handoffs.add_receiver(receiver(1))
    assert handoffs.landing.claim(key(), (3, 4)) is None
    assert handoffs.landing.claim(key("other"), (4, 5)) == "block 4 is landing for another hand-off"
    handoffs.forget(Handle("r", 0, 1))
    assert handoffs.landing.claim(key("other"), (4, 5)) is None


@pytest.mark.parametrize(
    ("block_ids", "why"),
    [((1, 2, 1), "a block is listed twice"), ((7, 8), "outside the pool of 8"), ((-1,), "outside the pool of 8")],
)
def test_a_claim_that_cannot_be_takes_nothing(block_ids: tuple[int, ...], why: str) -> None:
    blocks = LandingBlocks(8)
    assert why in str(blocks.claim(key(), block_ids))
    assert blocks.claim(key("other"), tuple(b for b in dict.fromkeys(block_ids) if 0 <= b < 8)) is None


@pytest.mark.parametrize(
    ("event", "counts"),
    [
        (Failed(key(), "why"), HandoffCounts(failed=1)),
        (Failed(key(), "why", Cause.CHECKSUM), HandoffCounts(failed=1, checksum_failures=1)),
        (Failed(key(), "why", Cause.CANCELLED), HandoffCounts()),
        (Failed(key(), "why", Cause.FINISHED), HandoffCounts()),
        (Released(key(), acked=True), HandoffCounts(acked=1)),
        (Released(key(), acked=False), HandoffCounts()),
    ],
    ids=repr,
)
def test_every_event_is_told_and_ends_are_counted_by_their_kind(event: Event, counts: HandoffCounts) -> None:
    handoffs, events = table()
    handoffs.emit(event)
    assert (events, handoffs.counts) == ([event], counts)
