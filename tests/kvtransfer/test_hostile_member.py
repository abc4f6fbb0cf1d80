"""A peer that knows the secret and still lies: what it says of others' hand-offs, or out of turn, changes nothing."""

from __future__ import annotations

import tracemalloc

import pytest

from kvbaton.kvtransfer.messages import Cause, Landed, Landing, Offered, Released
from kvbaton.kvtransfer.wire import (
    BLOCK_TAG,
    AckMessage,
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    GrantMessage,
    Handle,
    Message,
    RenewMessage,
)
from support.transfer_rig import BareEngine, Engine, Rig, key, kinds, offer

FOREIGN = {
    "grant": lambda handle: GrantMessage(handle, BLOCK_TAG | 5, 0, 4),
    "ack": AckMessage,
    "blocks": lambda handle: BlocksMessage(handle, 0, 4),
    "done": lambda handle: DoneMessage(handle, 4, b"wrong"),
    "cancel": lambda handle: CancelMessage(handle, "not yours", Cause.CANCELLED),
    "fail": lambda handle: FailMessage(handle, "not yours"),
    "renew": lambda handle: RenewMessage(0, False, (handle,)),
}


def honest_and_liar() -> tuple[Rig, Engine, Engine, BareEngine, Handle]:
    """p has offered to d, and to the liar, which has offered to d. The handle is that of the first."""
    rig = Rig()
    prefill, decode, liar = rig.engine("p"), rig.engine("d"), rig.bare("liar")
    prefill.memory.fill(1)
    prefill.agent.offer(offer(4), decode.agent.address())
    prefill.agent.offer(offer(2, "for-liar"), liar.address)
    liar.to(decode.agent.address()).offer(Handle("of-liar", 0, 1), offer(2, "of-liar"), rig.clock())
    rig.settle()
    told = liar.handoffs.receivers[key("for-liar")].handle
    return rig, prefill, decode, liar, Handle("r", 0, told.serial - 1)


@pytest.mark.parametrize("victim", ["p", "d"])
@pytest.mark.parametrize("what", FOREIGN)
def test_nobody_speaks_for_another_ones_hand_off(what: str, victim: str) -> None:
    rig, prefill, decode, liar, handle = honest_and_liar()
    liar.session_with(victim).send(FOREIGN[what](handle))
    rig.settle()
    decode.agent.grant(key(), Landing(0, (20, 21, 22, 23)))
    prefill.agent.blocks_ready(key(), [1, 2, 3, 4])
    prefill.agent.finish(key(), b"right")
    rig.settle()
    assert Landed(key(), b"right") in decode.events
    decode.agent.ack(key())
    rig.settle()
    assert Released(key(), True) in prefill.events
    assert [decode.memory.digest(b) for b in (20, 21, 22, 23)] == [prefill.memory.digest(b) for b in (1, 2, 3, 4)]


@pytest.mark.parametrize("handle", [Handle("unknown", 0, 1), Handle("for-liar", 0, 77)], ids=["unknown", "forged"])
def test_a_grant_for_nothing_is_refused_and_allocates_nothing(handle: Handle) -> None:
    """Guards a queue of millions of answers to receives that nobody was asked to post."""
    rig, prefill, _, liar, _ = honest_and_liar()
    tracemalloc.start()
    for _ in range(20):
        liar.session_with("p").send(GrantMessage(handle, BLOCK_TAG | 5, 0, (1 << 20) - 1))
    rig.settle()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert not prefill.agent.busy


@pytest.mark.parametrize(("count", "answered"), [(2, True), (3, False)])
def test_a_late_grant_is_answered_for_as_many_blocks_as_were_offered(count: int, answered: bool) -> None:
    """One that crosses the cancel is answered block by block; one for more blocks is refused as anybody's would be."""
    _, prefill, _, liar, _ = honest_and_liar()
    handle = liar.handoffs.receivers[key("for-liar")].handle
    prefill.agent.cancel(key("for-liar"), "given up")
    prefill.agent.poll()
    liar.session_with("p").send(GrantMessage(handle, BLOCK_TAG | 5, 0, count))
    prefill.agent.poll()
    assert prefill.agent.busy is answered
    assert Offered in kinds(liar.events)


def hostile_messages() -> list[Message]:
    handle = Handle("x", 0, 1)
    return [make(handle) for make in FOREIGN.values()]


def test_messages_of_unknown_hand_offs_cost_at_most_an_answer_each() -> None:
    rig, prefill, _, liar, _ = honest_and_liar()
    before = prefill.agent.stats().messages
    for message in hostile_messages():
        liar.session_with("p").send(message)
    rig.settle()
    assert prefill.agent.stats().messages - before <= 2 * len(FOREIGN) + 1
    assert (prefill.agent.stats().sending, prefill.agent.stats().receiving) == (2, 0)
