"""HELLO: two agents show each other that they hold the cluster secret and fit together, before anything else is read.

    initiator                                   acceptor
      HELLO  {who, what, nonce, MAC}   ->         secret right? version, generation and fields equal?
                                       <-  HELLO  {who, what, nonce, MAC over both}
      PROOF  {MAC over both}           ->         open

Each MAC is HMAC-SHA256 under the cluster secret with its own label; the last two cover both fresh nonces, so a
recorded exchange proves nothing. The first MAC keeps strangers from learning anything; what a replay of it gets back
is useless without the secret. A refusal is a REFUSE frame whose reason the other side reports. The body carries the
transport's own blob (UCX: the worker address), which therefore is authenticated before UCX parses it.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.wire import PROTOCOL_VERSION, WireError, unpack_array

MAX_HELLO_BYTES = 64 << 10
_NONCE_BYTES = 32
_MAGIC = "kvbaton"


class HandshakeRefused(Exception):
    """The peers do not fit or do not trust each other; the text is the reason that is reported."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who an agent is, what its KV blocks mean (`compatibility`), and where its transport is reached (`blob`)."""

    address: PeerAddress
    compatibility: tuple[tuple[str, str], ...]
    blob: bytes
    nonce: bytes = b""


class _Kind(enum.IntEnum):
    HELLO = 1
    HELLO_REPLY = 2
    PROOF = 3
    REFUSE = 4


@dataclass(frozen=True, slots=True)
class Step:
    """What to send now, and the peer's HELLO once it is trusted."""

    send: bytes | None = None
    peer: Hello | None = None


class Handshake:
    """One side of one exchange. `admit` may veto a peer by raising HandshakeRefused.

    `own` is called when the own HELLO is due: an acceptor spends nothing on a peer that has not shown the secret.
    """

    def __init__(
        self, secret: bytes, initiator: bool, own: Callable[[], Hello], admit: Callable[[Hello], None]
    ) -> None:
        self._secret = secret
        self._make_own = own
        self._admit = admit
        self._initiator = initiator
        self._body = b""
        self._transcript = b""
        self._peer: Hello | None = None

    def start(self) -> Step:
        """The initiator's first frame."""
        self._say_who_we_are()
        return Step(send=self._frame(_Kind.HELLO, self._body, _digest(self._body)))

    def receive(self, data: bytes | bytearray) -> Step:
        """Take the peer's next frame. Raises HandshakeRefused (also for a REFUSE frame) or WireError."""
        kind, body, mac = _parse_frame(data)
        if kind is _Kind.REFUSE:
            raise HandshakeRefused(body.decode(errors="replace")[:1024])
        if self._initiator and kind is _Kind.HELLO_REPLY and not self._transcript:
            return self._on_reply(body, mac)
        if not self._initiator and kind is _Kind.HELLO and not self._transcript:
            return self._on_hello(body, mac)
        if not self._initiator and kind is _Kind.PROOF and self._peer is not None:
            self._verify(_Kind.PROOF, self._transcript, mac)
            return Step(peer=self._peer)
        raise HandshakeRefused(f"unexpected {kind.name} in the handshake")

    def _on_hello(self, body: bytes, mac: bytes) -> Step:
        self._verify(_Kind.HELLO, _digest(body), mac)
        peer = _unpack_hello(body)
        self._admit(peer)
        self._say_who_we_are()
        self._transcript = _digest(body) + _digest(self._body)
        self._peer = peer
        return Step(send=self._frame(_Kind.HELLO_REPLY, self._body, self._transcript))

    def _on_reply(self, body: bytes, mac: bytes) -> Step:
        transcript = _digest(self._body) + _digest(body)
        self._verify(_Kind.HELLO_REPLY, transcript, mac)
        peer = _unpack_hello(body)
        self._admit(peer)
        self._transcript = transcript
        return Step(send=self._frame(_Kind.PROOF, b"", transcript), peer=peer)

    def _say_who_we_are(self) -> None:
        self._body = _pack_hello(replace(self._make_own(), nonce=secrets.token_bytes(_NONCE_BYTES)))

    def _verify(self, kind: _Kind, covered: bytes, mac: bytes) -> None:
        if not hmac.compare_digest(self._mac(kind, covered), mac):
            raise HandshakeRefused("authentication failed: the peers do not share one cluster secret")

    def _mac(self, kind: _Kind, covered: bytes) -> bytes:
        return hmac.digest(self._secret, b"kvbaton-kv:%d:" % kind + covered, "sha256")

    def _frame(self, kind: _Kind, body: bytes, covered: bytes) -> bytes:
        return _pack([_MAGIC, PROTOCOL_VERSION, int(kind), body, self._mac(kind, covered)])


def refusal(reason: str) -> bytes:
    """The frame that tells a peer why it is turned away."""
    return _pack([_MAGIC, PROTOCOL_VERSION, int(_Kind.REFUSE), reason.encode()[:1024], b""])


def check_compatible(own: tuple[tuple[str, str], ...], peer: tuple[tuple[str, str], ...]) -> None:
    """Raises HandshakeRefused that names the first field that differs, with both values."""
    mine, theirs = dict(own), dict(peer)
    for name in (*mine, *(n for n in theirs if n not in mine)):
        here, there = mine.get(name, "absent"), theirs.get(name, "absent")
        if here != there:
            raise HandshakeRefused(f"incompatible engines: {name} is {here!r} here and {there!r} at the peer")


def _parse_frame(data: bytes | bytearray) -> tuple[_Kind, bytes, bytes]:
    parts = unpack_array(data, MAX_HELLO_BYTES, max_items=8)
    if len(parts) < 2 or parts[0] != _MAGIC or type(parts[1]) is not int:
        raise WireError("not a kvbaton handshake")
    if parts[1] != PROTOCOL_VERSION:
        raise HandshakeRefused(
            f"incompatible engines: protocol version is {PROTOCOL_VERSION} here and {parts[1]} at the peer"
        )
    if len(parts) != 5 or type(parts[3]) is not bytes or type(parts[4]) is not bytes:
        raise WireError("malformed handshake frame")
    try:
        return _Kind(parts[2]), parts[3], parts[4]
    except ValueError:
        raise WireError(f"unknown handshake frame {parts[2]!r:.40}") from None


def _pack_hello(hello: Hello) -> bytes:
    a = hello.address
    fields = [part for pair in hello.compatibility for part in pair]
    return _pack([a.engine_id, a.generation, a.host, a.port, fields, hello.blob, hello.nonce])


def _unpack_hello(body: bytes) -> Hello:
    parts = unpack_array(body, MAX_HELLO_BYTES, max_items=256)
    kinds = (str, int, str, int, list, bytes, bytes)
    if len(parts) != len(kinds) or any(type(p) is not k for p, k in zip(parts, kinds, strict=True)):
        raise WireError("malformed HELLO body")
    engine_id, generation, host, port, fields, blob, nonce = parts
    if len(fields) % 2 or any(type(f) is not str for f in fields) or len(nonce) != _NONCE_BYTES:
        raise WireError("malformed HELLO body")
    pairs = tuple(zip(fields[::2], fields[1::2], strict=True))
    return Hello(PeerAddress(engine_id, generation, host, port), pairs, blob, nonce)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


def _pack(parts: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(parts, use_bin_type=True)
    return packed
