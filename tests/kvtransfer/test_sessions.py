"""Guards the table of sessions: one each way per engine, an older one never beside a newer, strangers few and brief."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.handshake import HandshakeRefused
from kvbaton.kvtransfer.messages import Failed, Landing, Offered, Released
from kvbaton.kvtransfer.wire import Handle
from support.transfer_rig import BareEngine, EngineOptions, Rig, key, kinds, offer


def pair() -> tuple[Rig, BareEngine, BareEngine]:
    rig = Rig()
    return rig, rig.bare("p"), rig.bare("d")


def offered(rig: Rig, prefill: BareEngine, decode: BareEngine) -> None:
    session = prefill.to(decode.address)
    prefill.handoffs.senders[key()] = session.offer(Handle("r", 0, 1), offer(2), rig.clock())
    rig.settle()


def test_an_engine_is_met_once_each_way() -> None:
    rig, prefill, decode = pair()
    there = prefill.to(decode.address)
    rig.settle()
    assert prefill.to(decode.address) is there
    assert decode.to(prefill.address) is not decode.session_with("p"), "offers go over a connection of one's own"
    rig.settle()
    assert [len(e.sessions.snapshot()) for e in (prefill, decode)] == [2, 2]


def test_a_newer_incarnation_ends_the_sessions_of_the_older_one() -> None:
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    reborn = rig.bare("d", EngineOptions(generation=2))
    session = prefill.to(reborn.address)
    assert kinds(prefill.events) == [Failed, Released]
    assert "d was replaced by generation 2" in str(prefill.events[0])
    rig.settle()
    assert prefill.sessions.snapshot() == (session,)
    assert decode.sessions.snapshot() == ()
    with pytest.raises(HandshakeRefused, match="generation 1 of d is over: generation 2 is known"):
        prefill.to(decode.address)


def test_an_engine_that_connects_anew_ends_its_earlier_connection() -> None:
    """Its end of the old one may be gone without a word, and what that held must not wait for a lease."""
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    again = rig.bare("p")
    again.to(decode.address)
    rig.settle()
    assert kinds(decode.events) == [Offered, Failed, Released]
    assert decode.events[1] == Failed(key(), "p has connected anew")
    assert [s.peer for s in decode.sessions.snapshot()] == [again.address]


def test_another_incarnation_than_the_one_that_was_meant_is_refused() -> None:
    rig, prefill, decode = pair()
    prefill.to(replace(decode.address, generation=3))
    rig.settle()
    assert prefill.sessions.snapshot() == decode.sessions.snapshot() == ()


def test_strangers_are_few_and_have_connect_s_to_say_who_they_are() -> None:
    rig = Rig()
    decode = rig.bare("d", EngineOptions(settings=TransferConfig(max_strangers=2)))
    stranger = rig.bare("s")
    channels = [stranger.transport.connect("", decode.address.port) for _ in range(3)]
    decode.poll()
    assert decode.sessions.num_strangers() == 2
    assert [channel.lost() for channel in channels] == [None, None, "closed by the peer"]
    rig.clock.now += 5.0
    decode.poll()
    assert decode.sessions.num_strangers() == 0
    assert decode.sessions.snapshot() == ()


def test_a_hand_off_that_the_peer_does_not_know_ends_with_the_next_renewal() -> None:
    """Both sides agree again even if one of them lost a hand-off without a word."""
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    decode.session_with("p").receivers.clear()
    decode.handoffs.receivers.clear()
    rig.advance(4.0)
    assert prefill.events == [Failed(key(), "refused: no such hand-off here"), Released(key(), acked=False)]


def test_traffic_of_a_session_outlives_it() -> None:
    rig, prefill, decode = pair()
    offered(rig, prefill, decode)
    decode.handoffs.receivers[key()].grant(Landing(0, (4, 5)))
    prefill.handoffs.senders[key()].blocks_ready([1, 2], rig.clock())
    rig.settle()
    before = prefill.sessions.traffic(), decode.sessions.traffic()
    assert (before[0].bytes_sent, before[1].bytes_received) == (2 * 64, 2 * 64)
    assert before[0].messages > 3
    prefill.sessions.end_all("the end")
    decode.sessions.end_all("the end")
    assert (prefill.sessions.traffic(), decode.sessions.traffic()) == before
    assert prefill.handoffs.senders == decode.handoffs.receivers == {}
