"""Guards who may talk to an agent: a holder of the secret, freshly proven, with equal fields and a live generation."""

from __future__ import annotations

import hashlib
import hmac

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.kvtransfer.codec import WireError, pack, parts_of
from kvbaton.kvtransfer.handshake import Handshake, HandshakeFrame, HandshakeRefused, Hello, check_compatible, refusal
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.wire import PROTOCOL_VERSION
from support.wire_cases import UNPACKABLE, Wrong, legal, sample, wrong

FIELDS = (("model", "tiny"), ("dtype", "float32"))


def side(
    initiator: bool,
    name: str = "e",
    secret: bytes = b"s",
    fields: tuple[tuple[str, str], ...] = FIELDS,
    refuse: str = "",
) -> Handshake:
    def admit(hello: Hello) -> None:
        check_compatible(fields, hello.compatibility)
        if refuse:
            raise HandshakeRefused(refuse)

    hello = Hello(PeerAddress(name, 3, "127.0.0.1", 4242), fields, b"blob of " + name.encode())
    return Handshake(secret, initiator, lambda: hello, admit)


def frame(step_send: bytes | None) -> bytes:
    assert step_send is not None
    return step_send


def test_both_sides_learn_each_other_after_three_frames() -> None:
    client, server = side(True, "p"), side(False, "d")
    reply = server.receive(frame(client.start().send))
    assert reply.peer is None  # nothing is trusted before the proof
    proof = client.receive(frame(reply.send))
    assert proof.peer is not None
    assert (proof.peer.address, proof.peer.blob) == (PeerAddress("d", 3, "127.0.0.1", 4242), b"blob of d")
    done = server.receive(frame(proof.send))
    assert done.send is None
    assert done.peer is not None
    assert (done.peer.address.engine_id, done.peer.blob) == ("p", b"blob of p")


def test_a_wrong_secret_is_refused_at_the_first_frame() -> None:
    with pytest.raises(HandshakeRefused, match="authentication failed"):
        side(False).receive(frame(side(True, secret=b"other").start().send))


def test_an_acceptor_without_the_secret_is_refused() -> None:
    """The server parrots a HELLO that it once saw: it cannot cover the client's fresh nonce."""
    recorded = side(False).receive(frame(side(True).start().send))
    victim = side(True)
    victim.start()
    with pytest.raises(HandshakeRefused, match="authentication failed"):
        victim.receive(frame(recorded.send))


def test_a_replayed_exchange_proves_nothing() -> None:
    client, server = side(True), side(False)
    hello = frame(client.start().send)
    proof = frame(client.receive(frame(server.receive(hello).send)).send)
    assert server.receive(proof).peer is not None
    again = side(False)
    again.receive(hello)
    with pytest.raises(HandshakeRefused, match="authentication failed"):
        again.receive(proof)


def test_a_proof_cannot_come_first_or_twice_a_hello() -> None:
    client, server = side(True), side(False)
    hello = frame(client.start().send)
    reply = frame(server.receive(hello).send)
    with pytest.raises(HandshakeRefused, match="unexpected HELLO"):
        server.receive(hello)
    proof = frame(client.receive(reply).send)
    with pytest.raises(HandshakeRefused, match="unexpected PROOF"):
        side(False).receive(proof)
    with pytest.raises(HandshakeRefused, match="unexpected HELLO_REPLY"):
        client.receive(reply)


def test_a_tampered_body_is_refused() -> None:
    hello = bytearray(frame(side(True).start().send))
    hello[hello.index(b"blob")] ^= 1
    with pytest.raises(HandshakeRefused, match="authentication failed"):
        side(False).receive(hello)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ((("model", "big"), ("dtype", "float32")), "model is 'tiny' here and 'big' at the peer"),
        ((("model", "tiny"),), "dtype is 'float32' here and 'absent' at the peer"),
        ((*FIELDS, ("layout", "x")), "layout is 'absent' here and 'x' at the peer"),
    ],
)
def test_a_mismatch_names_the_field_and_both_values(theirs: tuple[tuple[str, str], ...], message: str) -> None:
    with pytest.raises(HandshakeRefused, match=message):
        side(False).receive(frame(side(True, fields=theirs).start().send))


def test_the_initiator_checks_the_fields_too() -> None:
    client, server = side(True), side(False, fields=FIELDS)
    reply = server.receive(frame(client.start().send))
    assert reply.send is not None
    other = side(True, refuse="generation 2 of d is over")
    other_reply = side(False).receive(frame(other.start().send))
    with pytest.raises(HandshakeRefused, match="generation 2 of d is over"):
        other.receive(frame(other_reply.send))


def test_an_acceptor_makes_nothing_for_a_stranger() -> None:
    made: list[str] = []

    def own() -> Hello:
        made.append("worker")
        return Hello(PeerAddress("d", 1, "", 0), FIELDS, b"")

    server = Handshake(b"s", False, own, lambda hello: None)
    with pytest.raises(HandshakeRefused):
        server.receive(frame(side(True, secret=b"other").start().send))
    assert made == []
    server.receive(frame(side(True).start().send))
    assert made == ["worker"]


def test_another_protocol_version_is_refused_with_both_numbers() -> None:
    parts = msgpack.unpackb(frame(side(True).start().send))
    parts[1] = 77
    with pytest.raises(HandshakeRefused, match=f"protocol version is {PROTOCOL_VERSION} here and 77 at the peer"):
        side(False).receive(msgpack.packb(parts))


def test_a_refusal_carries_its_reason_to_the_other_side() -> None:
    client = side(True)
    client.start()
    with pytest.raises(HandshakeRefused, match="go away"):
        client.receive(refusal("go away"))


@given(st.binary(max_size=300))
def test_random_bytes_end_the_handshake_and_nothing_else(data: bytes) -> None:
    with pytest.raises((WireError, HandshakeRefused)):
        side(False).receive(data)


def hello_of(body: bytes) -> bytes:
    """A HELLO of a peer that has the secret, whatever it says with it."""
    mac = hmac.digest(b"s", b"kvbaton-kv:1:" + hashlib.sha256(body).digest(), "sha256")
    return bytes(msgpack.packb(["kvbaton", PROTOCOL_VERSION, 1, body, mac]))


@given(legal(Hello, {}))
def test_every_hello_comes_back_equal(hello: Hello) -> None:
    heard: list[Hello] = []
    own = Hello(PeerAddress("d", 1, "", 0), FIELDS, b"")
    Handshake(b"s", False, lambda: own, heard.append).receive(hello_of(pack(hello)))
    assert heard == [hello]


@pytest.mark.parametrize("case", wrong(Hello, {}), ids=lambda case: case.label)
def test_each_wrong_field_of_a_hello_is_refused_by_name(case: Wrong) -> None:
    """A peer with the secret and a bug: the body is checked as strictly as the frame."""
    with pytest.raises(WireError) as refused:
        side(False).receive(hello_of(msgpack.packb(case.parts)))
    assert any(name in str(refused.value) for name in case.names)


FRAME = {"magic": "kvbaton", "version": PROTOCOL_VERSION}


@pytest.mark.parametrize("case", wrong(HandshakeFrame, FRAME), ids=lambda case: case.label)
def test_each_wrong_field_of_a_frame_is_refused(case: Wrong) -> None:
    """By name, once it is known that this is a peer of the same version."""
    with pytest.raises((WireError, HandshakeRefused)) as refused:
        side(False).receive(msgpack.packb(case.parts))
    strange = "not a kvbaton handshake" in str(refused.value) or "protocol version is" in str(refused.value)
    assert strange == (case.parts[:2] != ["kvbaton", PROTOCOL_VERSION])
    assert strange or any(name in str(refused.value) for name in case.names)


@pytest.mark.parametrize("alien", UNPACKABLE, ids=repr)
@pytest.mark.parametrize("field", range(5))
def test_a_map_or_an_extension_type_is_refused_everywhere(field: int, alien: object) -> None:
    parts = parts_of(sample(HandshakeFrame, FRAME))
    body = parts_of(sample(Hello, {}))
    parts[field], body[field % len(body)] = alien, alien
    for data in (msgpack.packb(parts, datetime=True), hello_of(msgpack.packb(body, datetime=True))):
        with pytest.raises(WireError, match="not msgpack"):
            side(False).receive(data)


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), lambda s: st.lists(s), max_leaves=12))
def test_any_body_under_the_right_secret_is_refused_or_decoded(body: object) -> None:
    packed = msgpack.packb(body) if _fits_msgpack(body) else b""
    with pytest.raises(WireError):
        side(False).receive(hello_of(packed))


def _fits_msgpack(body: object) -> bool:
    try:
        msgpack.packb(body)
    except (OverflowError, ValueError):
        return False
    return True
