"""Guards prefill's side: blocks are read only under a grant, each granted one is answered once, release comes last."""

from __future__ import annotations

import pytest

from kvbaton.kvtransfer.handoff import HandoffStateError, SenderState
from kvbaton.kvtransfer.messages import Failed, Granted, HandoffKey, Offer, Released
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.wire import BLOCK_TAG, BlocksMessage, DoneMessage, GrantMessage, Handle
from support.recording_link import RecordingLink

KEY = HandoffKey("r", 2)
HANDLE = Handle("r", 2, 7)
TAG = BLOCK_TAG + 100


def start(num_blocks: int = 4) -> tuple[SendHandoff, RecordingLink]:
    link = RecordingLink()
    sender = SendHandoff(HANDLE, Offer(KEY, num_blocks * 16, num_blocks), link, lease_s=10.0, now=0.0)
    sender.start()
    return sender, link


def grant(first: int, count: int) -> GrantMessage:
    return GrantMessage(HANDLE, TAG, first, count)


def in_state(state: SenderState) -> tuple[SendHandoff, RecordingLink]:
    """A sender of 4 blocks, two of them ready, brought to `state` with one send running where that is possible."""
    sender, link = start()
    sender.blocks_ready([10, 11], 0.0)
    if state is not SenderState.OFFERED:
        sender.on_grant(grant(1, 3), 0.0)
    if state in (SenderState.AWAITING_ACK, SenderState.DRAINING, SenderState.RELEASED):
        sender.blocks_ready([12, 13], 0.0)
        sender.finish(b"p", 0.0)
    if state in (SenderState.DRAINING, SenderState.RELEASED):
        sender.on_ack(0.0)
    if state is SenderState.RELEASED:
        for _ in range(3):
            sender.on_sent(None, 0.0)
    assert sender.state is state
    return sender, link


def test_blocks_wait_for_the_grant_and_cached_ones_are_skipped() -> None:
    sender, link = start()
    sender.blocks_ready([10, 11, 12], 0.0)
    assert link.queue == []
    sender.on_grant(grant(2, 2), 0.0)
    assert link.events == [Granted(KEY, 2)]
    assert link.queue == [2]
    assert (sender.source(2), sender.tag(2), sender.tag(3)) == (12, TAG, TAG + 1)
    sender.blocks_ready([13], 0.0)
    assert link.queue == [2, 3]
    assert link.sent[1:] == [BlocksMessage(HANDLE, 2, 1), BlocksMessage(HANDLE, 3, 1)]


def test_done_follows_the_last_block_and_release_follows_ack_and_sends() -> None:
    sender, link = in_state(SenderState.AWAITING_ACK)
    assert link.sent_kinds() == ["Offer", "Blocks", "Blocks", "Done"]
    assert link.sent[-1] == DoneMessage(HANDLE, 3, b"p")
    sender.on_sent(None, 0.0)
    sender.on_sent(None, 0.0)
    sender.on_ack(0.0)
    assert link.events == [Granted(KEY, 1)]
    assert sender.state is SenderState.DRAINING
    sender.on_sent(None, 0.0)
    assert link.events == [Granted(KEY, 1), Released(KEY, acked=True)]
    assert link.forgotten == [HANDLE]


def test_a_prompt_that_decode_has_cached_sends_no_block() -> None:
    sender, link = start()
    sender.on_grant(grant(4, 0), 0.0)
    sender.blocks_ready([10, 11, 12, 13], 0.0)
    sender.finish(b"p", 0.0)
    assert link.queue == []
    assert link.sent[-1] == DoneMessage(HANDLE, 0, b"p")
    sender.on_ack(0.0)
    assert link.events[-1] == Released(KEY, acked=True)


def test_finish_before_the_grant_is_kept_for_it() -> None:
    sender, link = start(2)
    sender.blocks_ready([1, 2], 0.0)
    sender.finish(b"p", 0.0)
    assert sender.state is SenderState.OFFERED
    sender.on_grant(grant(0, 2), 0.0)
    assert sender.state is SenderState.AWAITING_ACK
    assert link.queue == [0, 1]


LIVE = [SenderState.OFFERED, SenderState.SENDING, SenderState.AWAITING_ACK]


@pytest.mark.parametrize("state", LIVE)
def test_cancel_aborts_what_was_granted_and_releases_after_the_last_send(state: SenderState) -> None:
    sender, link = in_state(state)
    link.events.clear()
    sender.cancel("client left", 1.0)
    assert link.sent_kinds()[-1] == "Cancel"
    granted = [] if state is SenderState.OFFERED else [1, 2, 3]
    assert link.queue == granted  # each granted block is answered exactly once
    assert [sender.source(i) for i in granted] == [None] * len(granted)  # what has not left leaves as an abort
    for _ in granted:
        assert link.events == []
        assert sender.state is SenderState.DRAINING
        sender.on_sent(None, 1.0)
    assert link.events == [Released(KEY, acked=False)]
    assert sender.state is SenderState.RELEASED


@pytest.mark.parametrize("state", LIVE)
def test_a_peers_end_fails_first_and_releases_last(state: SenderState) -> None:
    sender, link = in_state(state)
    sent = len(link.sent)
    link.events.clear()
    sender.on_peer_end("no room", 1.0)
    assert link.events[0] == Failed(KEY, "no room")
    for _ in link.queue:
        sender.on_sent(None, 1.0)
    assert link.events == [Failed(KEY, "no room"), Released(KEY, acked=False)]
    assert len(link.sent) == sent  # the peer knows


@pytest.mark.parametrize("state", LIVE)
def test_a_lost_channel_releases_at_once(state: SenderState) -> None:
    sender, link = in_state(state)
    link.events.clear()
    sender.on_lost("peer died", 1.0)
    assert link.events == [Failed(KEY, "peer died"), Released(KEY, acked=False)]


def test_a_lost_channel_ends_a_drain_with_its_outcome() -> None:
    sender, link = in_state(SenderState.DRAINING)
    link.events.clear()
    sender.on_lost("peer died", 1.0)
    assert link.events == [Released(KEY, acked=True)]


@pytest.mark.parametrize("state", [SenderState.DRAINING, SenderState.RELEASED])
def test_an_ended_hand_off_ignores_every_further_end(state: SenderState) -> None:
    sender, link = in_state(state)
    before = (list(link.events), list(link.sent), list(link.queue))
    sender.cancel("late", 1.0)
    sender.on_peer_end("late", 1.0)
    sender.fail("late", 1.0)
    sender.blocks_ready([5], 1.0)
    sender.finish(b"", 1.0)
    sender.on_tick(1e9)
    assert (link.events, link.sent, link.queue) == before


@pytest.mark.parametrize("state", LIVE)
def test_an_expired_lease_fails_and_tells_the_peer(state: SenderState) -> None:
    sender, link = in_state(state)
    sender.on_tick(9.99)
    assert sender.live
    sender.renew(5.0)
    sender.on_tick(14.99)
    assert sender.live
    sender.on_tick(15.0)
    assert not sender.live
    assert link.sent_kinds()[-1] == "Fail"
    assert any(isinstance(e, Failed) and "lease" in e.reason for e in link.events)


@pytest.mark.parametrize(("first", "count"), [(0, 3), (1, 4), (5, 0), (0, 0)])
def test_a_grant_that_does_not_fit_the_offer_fails(first: int, count: int) -> None:
    sender, link = start()
    sender.on_grant(grant(first, count), 0.0)
    assert link.queue == []
    assert [type(e) for e in link.events] == [Failed, Released]


def test_a_second_grant_and_an_early_ack_are_illegal() -> None:
    sender, _ = in_state(SenderState.SENDING)
    with pytest.raises(HandoffStateError):
        sender.on_grant(grant(1, 3), 0.0)
    with pytest.raises(HandoffStateError):
        sender.on_ack(0.0)


def test_a_failed_send_fails_the_hand_off_and_aborts_the_rest() -> None:
    sender, link = in_state(SenderState.SENDING)
    assert link.queue == [1]
    sender.on_sent("unreachable", 0.0)
    assert link.queue == [1, 2, 3]
    assert link.events[-1] == Failed(KEY, "send failed: unreachable")
    sender.on_sent(None, 0.0)
    sender.on_sent(None, 0.0)
    assert link.events[-1] == Released(KEY, acked=False)


def test_too_many_or_too_few_blocks_are_a_failure_that_says_so() -> None:
    sender, link = start(2)
    sender.blocks_ready([1, 2, 3], 0.0)
    assert "3 blocks were made ready, 2 were offered" in str(link.events[0])
    sender, link = start(2)
    sender.blocks_ready([1], 0.0)
    sender.finish(b"", 0.0)
    assert "finished with 1 of 2 blocks" in str(link.events[0])
