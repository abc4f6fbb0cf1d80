"""Whole hand-offs between agents on the loopback transport, with a hand-moved clock.

Guards the protocol as the workers see it: which events each side gets, that every end releases both sides, and that
nothing is written outside the blocks that were granted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from msgspec import structs

from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.messages import (
    Cause,
    Failed,
    GivenUp,
    Granted,
    HandoffCounts,
    Landed,
    Landing,
    Offered,
    PeerAddress,
    Released,
)
from kvbaton.settings import ConfigError
from support.transfer_rig import Engine, EngineOptions, Rig, key, kinds, offer


def pair(options: EngineOptions | None = None) -> tuple[Rig, Engine, Engine]:
    rig = Rig()
    prefill, decode = rig.engine("p", options or EngineOptions()), rig.engine("d", options or EngineOptions())
    prefill.memory.fill(1)
    return rig, prefill, decode


def offered(rig: Rig, prefill: Engine, decode: Engine, blocks: int = 4, name: str = "r") -> None:
    prefill.agent.offer(offer(blocks, name), decode.agent.address())
    rig.settle()


def run_to(state: str, rig: Rig, prefill: Engine, decode: Engine) -> None:
    """Bring a hand-off of 4 blocks to one of the states below, events taken."""
    steps: dict[str, Callable[[], None]] = {
        "offered": lambda: offered(rig, prefill, decode),
        "granted": lambda: decode.agent.grant(key(), Landing(1, (20, 21, 22))),
        "sending": lambda: prefill.agent.blocks_ready(key(), [1, 2, 3]),
        "landed": lambda: (prefill.agent.blocks_ready(key(), [4]), prefill.agent.finish(key(), b"p"))[0],
    }
    for name, step in steps.items():
        step()
        rig.settle()
        if name == state:
            break
    prefill.take()
    decode.take()


STATES = ["offered", "granted", "sending", "landed"]


def test_chunks_travel_as_they_are_ready_and_land_where_they_were_granted() -> None:
    rig, prefill, decode = pair()
    before = decode.memory.array.copy()
    offered(rig, prefill, decode, blocks=6)
    assert decode.take() == [Offered(offer(6), prefill.agent.address())]
    prefill.agent.blocks_ready(key(), [1, 2, 3])
    rig.settle()
    assert (prefill.take(), decode.take()) == ([], [])
    decode.agent.grant(key(), Landing(2, (5, 9, 3, 7)))
    rig.settle()
    assert prefill.take() == [Granted(key(), 2)]
    assert decode.memory.digest(5) == prefill.memory.digest(3)  # sent before the rest was ready
    prefill.agent.blocks_ready(key(), [4, 5, 6])
    prefill.agent.finish(key(), b"first token")
    rig.settle()
    assert decode.take() == [Landed(key(), b"first token")]
    assert prefill.take() == []
    decode.agent.ack(key())
    rig.settle()
    assert prefill.take() == [Released(key(), acked=True)]
    assert decode.take() == []
    before[[5, 9, 3, 7]] = prefill.memory.array[[3, 4, 5, 6]]
    assert (decode.memory.array == before).all()
    rig.assert_nothing_held()
    sent, received = prefill.agent.stats(), decode.agent.stats()
    assert (sent.bytes_sent, received.bytes_received, sent.handoffs_acked) == (4 * 64, 4 * 64, 1)


def test_a_fully_cached_prompt_moves_no_block() -> None:
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    decode.agent.grant(key(), Landing(4, ()))
    prefill.agent.blocks_ready(key(), [1, 2, 3, 4])
    prefill.agent.finish(key(), b"p")
    rig.settle()
    assert decode.take()[-1] == Landed(key(), b"p")
    decode.agent.ack(key())
    rig.settle()
    assert prefill.take()[-1] == Released(key(), acked=True)
    assert prefill.agent.stats().bytes_sent == 0
    rig.assert_nothing_held()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_cancel_in_every_state_of_either_side(state: str, side: str) -> None:
    rig, prefill, decode = pair()
    run_to(state, rig, prefill, decode)
    own, other = (prefill, decode) if side == "prefill" else (decode, prefill)
    own.agent.cancel(key(), "client left")
    rig.settle()
    assert own.take() == [Released(key(), acked=False)]
    if state == "landed" and side == "prefill":
        assert other.take() == []  # decode has every byte: it goes on, and its ack finds nobody
        other.agent.ack(key())
        rig.settle()
        assert own.take() == []
    else:
        assert other.take() == [Failed(key(), "client left", Cause.CANCELLED), Released(key(), acked=False)]
    rig.assert_nothing_held()


@pytest.mark.parametrize("cause", [Cause.CANCELLED, Cause.FINISHED])
def test_the_cause_of_a_cancel_crosses_the_wire_and_counts_as_no_failure(cause: GivenUp) -> None:
    rig, prefill, decode = pair()
    run_to("granted", rig, prefill, decode)
    prefill.agent.cancel(key(), "over", cause)
    rig.settle()
    assert decode.take() == [Failed(key(), "over", cause), Released(key(), acked=False)]
    assert prefill.agent.counts() == decode.agent.counts() == HandoffCounts()
    rig.assert_nothing_held()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_agent_that_closes_in_every_state_releases_both_sides(state: str, side: str) -> None:
    rig, prefill, decode = pair()
    run_to(state, rig, prefill, decode)
    own = prefill if side == "prefill" else decode
    own.agent.close()
    rig.engines.remove(own)
    rig.settle()
    if state == "landed":
        decode.agent.ack(key())  # whether or not the other lives
        decode.agent.poll()
    sender_ends = [Failed, Released]
    receiver_ends = [] if state == "landed" else [Failed, Released]
    assert kinds(prefill.take()) == sender_ends
    assert kinds(decode.take()) == receiver_ends
    rig.assert_nothing_held()


def test_cancel_while_the_grant_is_on_its_way_completes_its_receives() -> None:
    """Decode has posted receives for a hand-off that prefill no longer knows: they must not hang."""
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    decode.agent.grant(key(), Landing(0, (20, 21, 22, 23)))
    decode.agent.poll()
    prefill.agent.cancel(key(), "crossed")
    before = decode.memory.array.copy()
    rig.settle()
    assert prefill.take() == [Released(key(), acked=False)]
    assert decode.take() == [
        Offered(offer(4), prefill.agent.address()),
        Failed(key(), "crossed", Cause.CANCELLED),
        Released(key(), acked=False),
    ]
    assert (decode.memory.array == before).all()
    rig.assert_nothing_held()


def test_a_cancelled_key_can_be_offered_again_and_old_blocks_stay_out() -> None:
    rig, prefill, decode = pair()
    run_to("granted", rig, prefill, decode)
    prefill.agent.cancel(key(), "again")
    rig.settle()
    offered(rig, prefill, decode)
    assert kinds(decode.take()) == [Failed, Released, Offered]
    decode.agent.grant(key(), Landing(0, (20, 21, 22, 23)))
    prefill.agent.blocks_ready(key(), [5, 6, 7, 8])
    prefill.agent.finish(key(), b"p")
    rig.settle()
    assert [decode.memory.digest(b) for b in (20, 21, 22, 23)] == [prefill.memory.digest(b) for b in (5, 6, 7, 8)]


def test_unknown_keys_are_ignored_by_every_command() -> None:
    rig, prefill, decode = pair()
    for command in (
        lambda: prefill.agent.blocks_ready(key("x"), [1]),
        lambda: prefill.agent.finish(key("x"), b""),
        lambda: decode.agent.grant(key("x"), Landing(0, (1,))),
        lambda: decode.agent.ack(key("x")),
        lambda: decode.agent.cancel(key("x"), "why"),
    ):
        command()
    rig.settle()
    assert (prefill.take(), decode.take()) == ([], [])
    rig.assert_nothing_held()


@pytest.mark.parametrize(
    ("landing", "why"),
    [
        (Landing(0, (1, 2, 3)), "landing of 0+3 blocks"),
        (Landing(1, (1, 2, 3, 4)), "landing of 1+4 blocks"),
        (Landing(0, (1, 2, 2, 3)), "listed twice"),
        (Landing(0, (1, 2, 3, 32)), "outside the pool"),
        (Landing(0, (-1, 2, 3, 4)), "outside the pool"),
        (Landing(0, (1, 2, 3, 20)), "block 20 is landing for another"),
    ],
)
def test_a_landing_that_cannot_be_is_refused_before_anything_is_posted(landing: Landing, why: str) -> None:
    rig, prefill, decode = pair()
    offered(rig, prefill, decode, name="other")
    decode.agent.grant(key("other"), Landing(0, (20, 21, 22, 23)))
    offered(rig, prefill, decode)
    prefill.take(), decode.take()
    decode.agent.grant(key(), landing)
    rig.settle()
    failed, released = decode.take()
    assert isinstance(failed, Failed)
    assert why in failed.reason
    assert released == Released(key(), acked=False)
    assert kinds(prefill.take()) == [Failed, Released]


def test_block_ids_outside_the_pool_are_refused_at_prefill() -> None:
    rig, prefill, decode = pair()
    run_to("granted", rig, prefill, decode)
    prefill.agent.blocks_ready(key(), [1, 2, 999])
    rig.settle()
    assert kinds(prefill.take()) == [Failed, Released]
    assert kinds(decode.take()) == [Failed, Released]


def test_a_landing_block_stays_quarantined_until_the_sender_has_answered() -> None:
    rig, prefill, decode = pair()
    run_to("granted", rig, prefill, decode)
    decode.agent.cancel(key(), "client left")
    decode.agent.poll()
    assert decode.take() == []
    assert decode.agent.stats().quarantined_blocks == 3
    rig.settle()
    assert decode.take() == [Released(key(), acked=False)]
    rig.assert_nothing_held()


def test_a_frozen_peer_that_is_told_of_a_cancel_costs_the_session_after_answer_s() -> None:
    """Guards landing blocks that wait for a peer of which everybody else knows that it is gone."""
    options = EngineOptions(settings=TransferConfig(lease_s=30.0, drain_s=5.0, answer_s=1.0))
    rig, prefill, decode = pair(options)
    run_to("granted", rig, prefill, decode)
    rig.engines.remove(prefill)  # frozen
    rig.advance(3.0)
    decode.agent.cancel(key(), "client left")
    rig.advance(0.5)
    assert decode.take() == []
    rig.advance(1.25)
    assert decode.take() == [Released(key(), acked=False)]
    rig.engines.append(prefill)  # thawed
    rig.settle()
    assert kinds(prefill.take()) == [Failed, Released]
    rig.assert_nothing_held()


def test_decode_renews_while_it_waits_for_room() -> None:
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    decode.take()
    rig.advance(60.0)
    assert prefill.take() == []
    decode.agent.grant(key(), Landing(0, (1, 2, 3, 4)))
    rig.settle()
    assert prefill.take() == [Granted(key(), 0)]


@pytest.mark.parametrize("state", STATES)
def test_a_frozen_decode_costs_prefill_one_lease(state: str) -> None:
    rig, prefill, decode = pair()
    run_to(state, rig, prefill, decode)
    rig.engines.remove(decode)
    rig.advance(9.5)
    assert prefill.take() == []
    rig.advance(6.0)  # the last renewal may have been a moment before the freeze
    assert kinds(prefill.take()) == [Failed, Released]
    assert prefill.agent.stats().quarantined_blocks == 0
    rig.engines.append(decode)
    rig.settle()
    assert kinds(decode.take()) == ([] if state == "landed" else [Failed, Released])
    decode.agent.ack(key())
    rig.settle()
    rig.assert_nothing_held()


@pytest.mark.parametrize("state", ["offered", "granted", "sending"])
def test_a_frozen_prefill_costs_decode_one_lease(state: str) -> None:
    rig, prefill, decode = pair()
    run_to(state, rig, prefill, decode)
    rig.engines.remove(prefill)
    rig.advance(9.0)
    assert decode.take() == []
    rig.advance(6.0)
    assert kinds(decode.take()) == [Failed, Released]


def test_a_wrong_secret_a_wrong_field_and_nobody_there_name_the_reason() -> None:
    rig = Rig()
    prefill = rig.engine("p")
    stranger = rig.engine("s", EngineOptions(secret=b"another"))
    misfit = rig.engine("m", EngineOptions(fields=(("model", "big"), ("dtype", "float32"), ("block_bytes", "64"))))
    for target, why in (
        (stranger.agent.address(), "authentication failed"),
        (misfit.agent.address(), "model is 'big' here and 'tiny' at the peer"),
        (PeerAddress("ghost", 1, "loopback", 99), "connection refused"),
    ):
        prefill.agent.offer(offer(2, target.engine_id), target)
        rig.settle()
        failed, released = prefill.take()
        assert isinstance(failed, Failed)
        assert why in failed.reason
        assert released == Released(key(target.engine_id), acked=False)
    assert (stranger.take(), misfit.take()) == ([], [])
    rig.assert_nothing_held()


def test_a_peer_that_never_says_hello_fails_the_offer_after_connect_s() -> None:
    rig, prefill, decode = pair()
    rig.engines.remove(decode)
    prefill.agent.offer(offer(2), decode.agent.address())
    rig.advance(4.5)
    assert prefill.take() == []
    rig.advance(1.0)
    failed, _ = prefill.take()
    assert "no handshake within 5.0 s" in str(failed)


def test_a_new_generation_replaces_the_old_one_and_all_it_held() -> None:
    rig, prefill, decode = pair()
    run_to("sending", rig, prefill, decode)
    reborn = rig.engine("p", EngineOptions(generation=2))
    reborn.agent.offer(offer(2, "new"), decode.agent.address())
    rig.settle()
    failed, released, arrived = decode.take()
    assert failed == Failed(key(), "p was replaced by generation 2")
    assert (released, kinds([arrived])) == (Released(key(), acked=False), [Offered])
    assert kinds(prefill.take()) == [Failed, Released]
    prefill.agent.offer(offer(2, "stale"), decode.agent.address())
    rig.settle()
    assert "generation 1 of p is over: generation 2 is known" in str(prefill.take()[0])


def test_an_offer_to_a_new_generation_leaves_the_old_session() -> None:
    rig, prefill, decode = pair()
    run_to("granted", rig, prefill, decode)
    reborn = rig.engine("d", EngineOptions(generation=2))
    prefill.agent.offer(offer(2, "new"), reborn.agent.address())
    rig.settle()
    assert kinds(prefill.take()) == [Failed, Released]
    assert kinds(reborn.take()) == [Offered]
    old = decode.agent.address()
    prefill.agent.offer(offer(2, "stale"), old)
    rig.settle()
    assert "generation 1 of d is over" in str(prefill.take()[0])


def test_an_address_where_another_incarnation_listens_is_refused() -> None:
    rig, prefill, decode = pair()
    prefill.agent.offer(offer(2), structs.replace(decode.agent.address(), generation=5))
    rig.settle()
    assert "expected d generation 5, met d generation 1" in str(prefill.take()[0])
    assert decode.take() == []


def test_the_same_key_from_two_prefills_is_taken_once() -> None:
    rig, prefill, decode = pair()
    second = rig.engine("p2")
    offered(rig, prefill, decode)
    offered(rig, second, decode)
    assert kinds(decode.take()) == [Offered]
    assert kinds(second.take()) == [Failed, Released]
    assert prefill.take() == []


def test_caps_on_open_hand_offs_blocks_and_payload() -> None:
    rig, prefill, decode = pair()
    tight = EngineOptions(
        settings=TransferConfig(max_handoffs_per_session=2, max_blocks_per_handoff=8, max_payload_bytes=10)
    )
    small = rig.engine("small", tight)
    for name in ("a", "b", "c"):
        prefill.agent.offer(offer(2, name), small.agent.address())
    prefill.agent.offer(offer(9, "big"), small.agent.address())
    rig.settle()
    assert kinds(small.take()) == [Offered, Offered]
    refused = [str(e) for e in prefill.take() if isinstance(e, Failed)]
    assert len(refused) == 2
    assert all("more than 2 open hand-offs" in r for r in refused)
    small.agent.offer(offer(0, "x"), decode.agent.address())
    small.agent.finish(key("x"), b"eleven bytes")
    rig.settle()
    assert "payload of 12 bytes is over 10" in str(small.take()[0])


def test_many_hand_offs_both_ways_keep_their_blocks_apart() -> None:
    rig, left, right = pair(EngineOptions(num_blocks=256, settings=TransferConfig(send_window=3)))
    right.memory.fill(2)
    sources = left.memory.array[:64].copy(), right.memory.array[:64].copy()
    for i in range(16):
        for here, there in ((left, right), (right, left)):
            here.agent.offer(offer(4, f"{i}"), there.agent.address())
    rig.settle()
    for here, there in ((left, right), (right, left)):
        offers = [e.offer.key for e in here.take() if isinstance(e, Offered)]
        assert len(offers) == 16
        for i, handoff in enumerate(offers):
            here.agent.grant(handoff, Landing(0, tuple(range(128 + 4 * i, 132 + 4 * i))))
            there.agent.blocks_ready(handoff, range(4 * i, 4 * i + 4))
            there.agent.finish(handoff, b"")
    rig.settle()
    for engine, source in ((left, sources[1]), (right, sources[0])):
        landed = [e.key for e in engine.take() if isinstance(e, Landed)]
        assert len(landed) == 16
        assert (engine.memory.array[128:192] == source).all()
        for handoff in landed:
            engine.agent.ack(handoff)
    rig.settle()
    rig.assert_nothing_held()


@pytest.mark.parametrize("field", ["lease_s", "connect_s", "drain_s", "send_window", "max_payload_bytes"])
def test_settings_that_cannot_work_are_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(TransferConfig(), **{field: 0})


@pytest.mark.parametrize("idle_s", [11.0, 3600.0])
def test_first_hand_off_after_an_idle_time_has_its_whole_lease(idle_s: float) -> None:
    """Guards times of the last poll or the last word taken for now: an idle agent sleeps, and nobody says anything."""
    rig, prefill, decode = pair()
    offered(rig, prefill, decode, name="a")
    decode.agent.grant(key("a"), Landing(4, ()))
    prefill.agent.blocks_ready(key("a"), [1, 2, 3, 4])
    prefill.agent.finish(key("a"), b"p")
    rig.settle()
    decode.agent.ack(key("a"))
    rig.settle()
    prefill.take(), decode.take()
    rig.clock.now += idle_s  # and no poll in between
    offered(rig, prefill, decode, name="b")
    assert decode.take() == [Offered(offer(4, "b"), prefill.agent.address())]
    rig.advance(9.0)
    assert (prefill.take(), decode.take()) == ([], [])
    assert len(prefill.agent.stats().peers) == 1, "over the session that there was"
