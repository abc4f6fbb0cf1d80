"""Hand-offs that are sent: each holds its blocks itself, from the offer until nobody can read them."""

from __future__ import annotations

import pytest

from kvbaton.engine.kv.block_owners import BlockOwners, Holding, Owner
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.outgoing import OutgoingHandoffs, OutgoingState
from kvbaton.engine.sequence import IllegalTransition
from kvbaton.kvtransfer.messages import Cause, HandoffKey, Offer
from support.leg_bench import PEER
from support.recording_agent import RecordingAgent

KEY = HandoffKey("p", 0)


class Rig:
    """A sequence's table of three blocks of 4 tokens."""

    def __init__(self) -> None:
        self.kv = KVManager(8, 4, prefix_cache=True)
        self.agent = RecordingAgent()
        self.owners = BlockOwners()
        self.outgoing = OutgoingHandoffs(self.kv, self.agent, self.owners)
        self.table = self.kv.allocate(3)

    def start_prompt(self) -> None:
        self.outgoing.start_prompt(KEY, PEER, self.table, 10)

    def counts(self) -> tuple[int, int, int]:
        """Held for peers, quarantined, held at all."""
        return self.owners.count(Owner.HOLD), self.owners.count(Owner.QUARANTINE), self.kv.counts().held


def test_prompt_travels_as_it_becomes_final() -> None:
    r = Rig()
    r.start_prompt()
    for final in (0, 1, 1, 2):
        r.outgoing.announce(KEY, final)
    r.outgoing.complete(KEY, b"first")
    assert r.agent.calls == [
        ("offer", Offer(KEY, 10, 3)),
        ("blocks_ready", (0,)),
        ("blocks_ready", (1,)),
        ("blocks_ready", (2,)),
        ("finish", b"first"),
    ]


def test_hold_outlives_the_sequence_and_ends_with_the_release() -> None:
    r = Rig()
    r.start_prompt()
    assert r.counts() == (0, 0, 3)
    assert list(r.outgoing.held()) == [Holding([0, 1, 2], None)]
    r.outgoing.complete(KEY, b"")
    r.kv.free(r.table)
    assert r.counts() == (3, 0, 3)
    assert r.outgoing.released(KEY)
    assert (r.counts(), len(r.outgoing)) == ((0, 0, 0), 0)
    assert not r.outgoing.released(KEY)


def test_blocks_of_a_decoding_sequence_are_final_at_once_and_more_may_follow() -> None:
    r = Rig()
    r.outgoing.start(KEY, PEER, r.table[:2], 3)
    assert (r.counts(), r.outgoing.num_blocks(KEY)) == ((2, 0, 3), 2)
    r.outgoing.extend(KEY, r.table[2:])
    r.outgoing.complete(KEY, b"newest")
    assert r.agent.names() == ["offer", "blocks_ready", "blocks_ready", "finish"]
    assert (r.counts(), r.outgoing.num_blocks()) == ((3, 0, 3), 3)


@pytest.mark.parametrize("state", [OutgoingState.OPEN, OutgoingState.SENT, OutgoingState.CLOSING])
@pytest.mark.parametrize("how", ["cancel", "failed"])
def test_end_in_every_state_keeps_the_hold_until_the_release(state: OutgoingState, how: str) -> None:
    r = Rig()
    r.start_prompt()
    if state is not OutgoingState.OPEN:
        r.outgoing.complete(KEY, b"")
    if state is OutgoingState.CLOSING:
        r.outgoing.failed(KEY)
    assert r.outgoing.state(KEY) is state
    news = state is not OutgoingState.CLOSING
    if how == "cancel":
        r.outgoing.cancel(KEY, "over", Cause.FINISHED)
        assert (("cancel", ("over", Cause.FINISHED)) in r.agent.calls) is news
    else:
        assert r.outgoing.failed(KEY) is news
        assert "cancel" not in r.agent.names()
    r.kv.free(r.table)
    assert r.counts() == (0, 3, 3)
    r.outgoing.announce(KEY, 3)
    assert r.agent.names().count("blocks_ready") == (state is not OutgoingState.OPEN), "nothing more is announced"
    r.outgoing.released(KEY)
    assert r.counts() == (0, 0, 0)


def test_what_is_over_cannot_be_completed() -> None:
    r = Rig()
    r.start_prompt()
    r.outgoing.cancel(KEY, "over")
    with pytest.raises(IllegalTransition, match="outgoing p: closing -> sent"):
        r.outgoing.complete(KEY, b"")


def test_unknown_keys_are_nobodys() -> None:
    r = Rig()
    r.outgoing.cancel(KEY, "over")
    assert (r.outgoing.failed(KEY), r.outgoing.released(KEY), r.outgoing.state(KEY)) == (False, False, None)
    assert r.agent.calls == []
