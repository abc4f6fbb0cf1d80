"""Guards decode's side: receives before GRANT, Landed only when all is here and the peer lives, release last."""

from __future__ import annotations

import pytest

from kvbaton.kvtransfer.handoff import HandoffStateError, ReceiverState
from kvbaton.kvtransfer.messages import Failed, HandoffKey, Landed, Landing, Offer, Released
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.wire import AckMessage, BlocksMessage, DoneMessage, GrantMessage, Handle
from support.recording_link import FIRST_TAG, RecordingLink

KEY = HandoffKey("r", 2)
HANDLE = Handle("r", 2, 7)


def start() -> tuple[ReceiveHandoff, RecordingLink]:
    link = RecordingLink()
    return ReceiveHandoff(HANDLE, Offer(KEY, 64, 4), link), link


def in_state(state: ReceiverState) -> tuple[ReceiveHandoff, RecordingLink]:
    """A receiver of 4 blocks with 3 granted, one of which has come where the state allows it."""
    receiver, link = start()
    if state is ReceiverState.OFFERED:
        return receiver, link
    receiver.grant(Landing(1, (20, 21, 22)))
    receiver.on_blocks(BlocksMessage(HANDLE, 1, 1), 0.0)
    link.receives[0].complete()
    receiver.poll(0.0)
    if state in (ReceiverState.LANDED, ReceiverState.RELEASED):
        receiver.on_blocks(BlocksMessage(HANDLE, 2, 2), 0.0)
        for receive in link.receives:
            receive.complete()
        receiver.on_done(DoneMessage(HANDLE, 3, b"p"), 0.0)
    if state is ReceiverState.DRAINING:
        receiver.cancel("test", 0.0)
    if state is ReceiverState.RELEASED:
        receiver.ack(0.0)
    assert receiver.state is state
    return receiver, link


def test_receives_are_posted_before_the_grant_leaves() -> None:
    receiver, link = start()
    sent_at_post: list[int] = []
    post = link.post_receive
    link.post_receive = lambda tag, block: (sent_at_post.append(len(link.sent)), post(tag, block))[1]  # type: ignore[method-assign]
    receiver.grant(Landing(1, (20, 21, 22)))
    assert sent_at_post == [0, 0, 0]
    assert [(r.tag, r.block_id) for r in link.receives] == [(FIRST_TAG, 20), (FIRST_TAG + 1, 21), (FIRST_TAG + 2, 22)]
    assert link.sent == [GrantMessage(HANDLE, FIRST_TAG, 1, 3)]


@pytest.mark.parametrize("done_first", [True, False])
def test_landed_needs_every_block_and_done_in_either_order(done_first: bool) -> None:
    receiver, link = start()
    receiver.grant(Landing(2, (20, 21)))
    receiver.on_blocks(BlocksMessage(HANDLE, 2, 2), 0.0)
    if done_first:
        receiver.on_done(DoneMessage(HANDLE, 2, b"p"), 0.0)
    link.receives[1].complete()
    receiver.poll(0.0)
    assert link.events == []
    link.receives[0].complete()
    receiver.poll(0.0)
    if not done_first:
        assert link.events == []
        receiver.on_done(DoneMessage(HANDLE, 2, b"p"), 0.0)
    assert link.events == [Landed(KEY, b"p")]
    receiver.ack(0.0)
    assert link.sent[-1] == AckMessage(HANDLE)
    assert (receiver.state, link.forgotten) == (ReceiverState.RELEASED, [HANDLE])
    assert link.events == [Landed(KEY, b"p")]  # after ack the blocks are the worker's: nothing is released


def test_everything_cached_lands_with_done_alone() -> None:
    receiver, link = start()
    receiver.grant(Landing(4, ()))
    assert link.events == []
    receiver.on_done(DoneMessage(HANDLE, 0, b"p"), 0.0)
    assert link.events == [Landed(KEY, b"p")]


def test_a_peer_that_hung_up_behind_its_last_block_lands_nothing() -> None:
    """It may have reused its memory before the read: the connection is asked after the last receive."""
    receiver, link = in_state(ReceiverState.LANDING)
    receiver.on_blocks(BlocksMessage(HANDLE, 2, 2), 0.0)
    link.connected = False
    for receive in link.receives:
        receive.complete()
    receiver.on_done(DoneMessage(HANDLE, 3, b"p"), 0.0)
    assert link.events == []
    receiver.on_lost("closed by the peer", 0.0)
    assert link.events == [Failed(KEY, "closed by the peer"), Released(KEY, acked=False)]


@pytest.mark.parametrize(
    ("state", "outstanding"), [(ReceiverState.OFFERED, 0), (ReceiverState.LANDING, 2), (ReceiverState.LANDED, 0)]
)
def test_cancel_in_each_state_releases_after_the_last_receive(state: ReceiverState, outstanding: int) -> None:
    receiver, link = in_state(state)
    link.events.clear()
    receiver.cancel("client left", 1.0)
    assert link.sent_kinds()[-1] == "Cancel"
    if outstanding:
        assert (receiver.state, link.events) == (ReceiverState.DRAINING, [])
        for receive in link.receives[1:]:
            assert link.events == []
            receive.complete()
            receiver.poll(1.0)
    assert link.events == [Released(KEY, acked=False)]
    assert receiver.state is ReceiverState.RELEASED


@pytest.mark.parametrize("state", [ReceiverState.OFFERED, ReceiverState.LANDING])
def test_a_peers_end_fails_and_releases(state: ReceiverState) -> None:
    receiver, link = in_state(state)
    receiver.on_peer_end("prefill aborted", 1.0)
    assert link.events[0] == Failed(KEY, "prefill aborted")
    for receive in link.receives:
        receive.complete()
    receiver.poll(1.0)
    assert link.events == [Failed(KEY, "prefill aborted"), Released(KEY, acked=False)]


def test_nothing_that_the_peer_does_takes_a_landing_back() -> None:
    receiver, link = in_state(ReceiverState.LANDED)
    receiver.on_peer_end("too late", 1.0)
    receiver.on_lost("too late", 1.0)
    assert link.events == [Landed(KEY, b"p")]
    receiver.ack(1.0)
    assert receiver.state is ReceiverState.RELEASED


@pytest.mark.parametrize("state", [ReceiverState.DRAINING, ReceiverState.RELEASED])
def test_an_ended_hand_off_ignores_every_further_end(state: ReceiverState) -> None:
    receiver, link = in_state(state)
    before = (list(link.events), list(link.sent))
    receiver.cancel("late", 1.0)
    receiver.on_peer_end("late", 1.0)
    receiver.fail("late", 1.0)
    assert (link.events, link.sent) == before


def test_a_failed_receive_fails_the_hand_off_and_drains_the_others() -> None:
    receiver, link = in_state(ReceiverState.LANDING)
    link.receives[1].complete("Message truncated")
    receiver.poll(1.0)
    assert link.events == [Failed(KEY, "receive failed: Message truncated")]
    assert link.sent_kinds()[-1] == "Fail"
    link.receives[2].complete()
    receiver.poll(1.0)
    assert link.events[-1] == Released(KEY, acked=False)


@pytest.mark.parametrize(
    "message",
    [
        BlocksMessage(HANDLE, 1, 1),  # announced before
        BlocksMessage(HANDLE, 3, 1),  # leaves a gap
        BlocksMessage(HANDLE, 2, 3),  # beyond the offer
        DoneMessage(HANDLE, 3, b""),  # before the last blocks were announced
    ],
)
def test_a_peer_that_miscounts_fails_the_hand_off(message: BlocksMessage | DoneMessage) -> None:
    receiver, link = in_state(ReceiverState.LANDING)
    if isinstance(message, BlocksMessage):
        receiver.on_blocks(message, 0.0)
    else:
        receiver.on_done(message, 0.0)
    assert isinstance(link.events[0], Failed)
    assert receiver.state is ReceiverState.DRAINING


def test_data_before_the_grant_is_illegal_and_ack_before_landed_fails() -> None:
    receiver, _ = in_state(ReceiverState.OFFERED)
    with pytest.raises(HandoffStateError):
        receiver.on_blocks(BlocksMessage(HANDLE, 0, 1), 0.0)
    with pytest.raises(HandoffStateError):
        receiver.on_done(DoneMessage(HANDLE, 0, b""), 0.0)
    receiver, link = in_state(ReceiverState.LANDING)
    receiver.ack(0.0)
    assert link.events == [Failed(KEY, "acknowledged while landing")]
