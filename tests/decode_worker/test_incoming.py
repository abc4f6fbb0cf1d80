"""Hand-offs that arrive: both orders of submit and offer, room, and an end in every state."""

from __future__ import annotations

import pytest

from kvbaton.decode_worker.incoming import EARLY_GRACE_S, MIGRATION_GRACE_S, Expected, IncomingHandoffs, IncomingState
from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.kv.block_owners import BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.kvtransfer.messages import Cause, HandoffKey, Landing, Offer, Offered
from support.leg_bench import PEER
from support.recording_agent import RecordingAgent

KEY = HandoffKey("d", 0)
PROMPT = tuple(range(1, 11))  # three blocks of 4


class Rig:
    def __init__(self, num_blocks: int = 8) -> None:
        self.kv = KVManager(num_blocks, 4, prefix_cache=True)
        self.agent = RecordingAgent()
        self.owners = BlockOwners()
        self.incoming = IncomingHandoffs(self.kv, self.agent, self.owners)

    def expect(self, key: HandoffKey = KEY, tokens: int | None = 10, patient: bool = True) -> None:
        self.incoming.expect(key, Expected(tokens, block_hashes(PROMPT[:8], 4), patient), 0.0)

    def offer(self, key: HandoffKey = KEY, tokens: int = 10, blocks: int = 3) -> None:
        self.incoming.offered(Offered(Offer(key, tokens, blocks), PEER), 0.0)

    def reach(self, state: str) -> None:
        if state != "early":
            self.expect()
        if state != "expected":
            self.offer()
        if state in ("granted", "closing"):
            assert self.incoming.grant_waiting(0) == []
        if state == "closing":
            self.incoming.cancel(KEY, "first")

    def calls(self, name: str) -> list[object]:
        return [what for called, what in self.agent.calls if called == name]


@pytest.mark.parametrize("order", ["submit first", "offer first"])
def test_both_orders_wait_for_room_and_hold_nothing_before(order: str) -> None:
    rig = Rig()
    for call in (rig.expect, rig.offer) if order == "submit first" else (rig.offer, rig.expect):
        call()
    assert (rig.incoming.state(KEY), rig.kv.counts().held) == (IncomingState.WAITING, 0)
    rig.incoming.grant_waiting(0)
    assert rig.calls("grant") == [Landing(0, (0, 1, 2))]
    assert (rig.owners.count(Owner.LANDING), rig.kv.counts().held) == (3, 3)
    assert rig.incoming.landed(KEY, 10) == [0, 1, 2]
    assert (rig.calls("ack"), rig.owners.listed, len(rig.incoming)) == ([KEY], 0, 0)
    assert rig.kv.counts().held == 3, "the caller's now"


def test_what_the_cache_has_does_not_land() -> None:
    rig = Rig()
    blocks = rig.kv.allocate(2)
    rig.kv.commit(block_hashes(PROMPT[:8], 4), blocks)
    rig.reach("granted")
    assert rig.calls("grant") == [Landing(2, (2,))]
    assert rig.kv.holders(blocks[0]) == 2


@pytest.mark.parametrize(
    ("tokens", "blocks", "message"),
    [(11, 3, "offer of 11 tokens in 3 blocks, expected 10 in 3"), (10, 4, "offer of 10 tokens in 4 blocks")],
)
def test_offer_of_something_else_is_refused(tokens: int, blocks: int, message: str) -> None:
    rig = Rig()
    rig.expect()
    rig.offer(tokens=tokens, blocks=blocks)
    ((reason, cause),) = rig.calls("cancel")  # type: ignore[misc]
    assert (message in reason, cause) == (True, Cause.CANCELLED)
    assert rig.incoming.state(KEY) is IncomingState.CLOSING


def test_reserve_is_left_to_running_sequences() -> None:
    rig = Rig(num_blocks=8)
    rig.reach("waiting")
    rig.incoming.grant_waiting(6)
    assert rig.incoming.waiting() == 1
    rig.incoming.grant_waiting(5)
    assert rig.incoming.waiting() == 0


def test_first_come_first_served_and_none_while_closed() -> None:
    rig = Rig(num_blocks=8)
    other = HandoffKey("small", 0)
    rig.expect()
    rig.offer()
    rig.incoming.expect(other, Expected(4), 0.0)
    rig.offer(other, 4, 1)
    assert rig.incoming.grant_waiting(0, closed=True) == []
    rig.incoming.grant_waiting(6)
    assert (rig.calls("grant"), rig.incoming.oldest_waiting()) == ([], KEY), "the small one waits behind the large"
    rig.incoming.grant_waiting(0)
    assert len(rig.calls("grant")) == 2


def test_impatient_one_is_refused_at_once_and_passes_the_patient() -> None:
    rig = Rig(num_blocks=8)
    rig.reach("waiting")
    other = HandoffKey("m", 0)
    rig.incoming.expect(other, Expected(None, patient=False), 0.0)
    rig.offer(other, 4, 1)
    assert rig.incoming.grant_waiting(0, closed=True) == [other]
    assert rig.incoming.grant_waiting(6) == [], "one block is there for it; three for the other are not"
    assert rig.incoming.state(other) is IncomingState.GRANTED


def test_rest_of_a_sequence_lands_behind_the_blocks_that_are_here() -> None:
    rig = Rig()
    here = rig.kv.allocate(2)
    rig.incoming.expect(KEY, Expected(None, patient=False), 0.0, list(here))
    assert rig.owners.count(Owner.LANDING) == 2
    rig.offer(tokens=16, blocks=4)
    rig.incoming.grant_waiting(0)
    assert rig.calls("grant") == [Landing(2, (2, 3))]
    assert rig.incoming.landed(KEY, 13) == [0, 1, 2, 3]


def test_rest_with_fewer_blocks_than_are_here_is_refused() -> None:
    rig = Rig()
    rig.incoming.expect(KEY, Expected(None, patient=False), 0.0, rig.kv.allocate(2))
    rig.offer(tokens=4, blocks=1)
    assert "offer of 1 blocks, 2 are here already" in str(rig.calls("cancel"))
    rig.incoming.released(KEY)
    assert rig.kv.counts().held == 0


def test_tokens_that_do_not_fit_the_blocks_change_nothing() -> None:
    rig = Rig()
    rig.reach("granted")
    with pytest.raises(ValueError, match="13 tokens came in 3 blocks of 4"):
        rig.incoming.landed(KEY, 13)
    assert (rig.incoming.state(KEY), rig.calls("ack")) == (IncomingState.GRANTED, [])


@pytest.mark.parametrize("how", ["cancelled", "failed"])
@pytest.mark.parametrize("state", ["nothing", "expected", "early", "waiting", "granted", "closing"])
def test_end_in_every_state(state: str, how: str) -> None:
    rig = Rig()
    if state != "nothing":
        rig.reach(state)
    told = state in ("early", "waiting", "granted")
    if how == "cancelled":
        rig.incoming.cancel(KEY, "over")
        assert (("over", Cause.CANCELLED) in rig.calls("cancel")) is told
    else:
        assert rig.incoming.failed(KEY) is told
    assert rig.incoming.landed(KEY, 10) is None, "what arrives now is not wanted"
    held = 3 if state in ("granted", "closing") else 0
    assert (rig.owners.count(Owner.QUARANTINE), rig.kv.counts().held) == (held, held)
    rig.incoming.released(KEY)
    assert rig.kv.counts().held == 0
    assert len(rig.incoming) == (1 if (state, how) == ("expected", "failed") else 0)


def test_offer_after_the_end_is_refused_for_its_reason_once() -> None:
    rig = Rig()
    rig.incoming.cancel(KEY, "the client left")
    rig.offer()
    assert rig.calls("cancel") == [("the client left", Cause.CANCELLED)]
    rig.offer()
    assert rig.incoming.state(KEY) is IncomingState.EARLY


def test_submit_after_the_end_is_a_new_one() -> None:
    rig = Rig()
    rig.incoming.cancel(KEY, "the client left")
    rig.expect()
    rig.offer()
    assert rig.incoming.state(KEY) is IncomingState.WAITING


def test_what_never_comes_is_given_up() -> None:
    rig = Rig()
    rig.offer()
    patient, hasty = HandoffKey("patient", 0), HandoffKey("hasty", 0)
    rig.expect(patient)
    rig.expect(hasty, patient=False)
    assert rig.incoming.expire(EARLY_GRACE_S) == []
    assert rig.calls("cancel") == []
    assert rig.incoming.expire(EARLY_GRACE_S + 0.1) == []
    assert [reason for reason, _ in rig.calls("cancel")] == ["decode: no ingress submitted this request"]  # type: ignore[misc]
    assert rig.incoming.expire(MIGRATION_GRACE_S + 0.1) == [hasty], "a prompt may wait in its prefill queue for long"
