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
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from kvbaton.kvtransfer.codec import WireError, convert, decode, pack, unpack
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.wire import PROTOCOL_VERSION

MAX_HELLO_BYTES = 64 << 10
MAX_COMPATIBILITY_FIELDS = 128
_NONCE_BYTES = 32
_MAGIC: Literal["kvbaton"] = "kvbaton"


class HandshakeRefused(Exception):
    """The peers do not fit or do not trust each other; the text is the reason that is reported."""


class Hello(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who an agent is, what its KV blocks mean (`compatibility`), and where its transport is reached (`blob`)."""

    address: PeerAddress
    compatibility: Annotated[tuple[tuple[str, str], ...], Meta(max_length=MAX_COMPATIBILITY_FIELDS)]
    blob: bytes
    nonce: Annotated[bytes, Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)] = b""


class _Kind(enum.IntEnum):
    HELLO = 1
    HELLO_REPLY = 2
    PROOF = 3
    REFUSE = 4


class HandshakeFrame(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What travels: `body` is a packed Hello, empty in a PROOF, the reason in UTF-8 in a REFUSE."""

    magic: Literal["kvbaton"]
    version: int
    kind: _Kind
    body: bytes
    mac: bytes


@dataclass(frozen=True, slots=True)
class HandshakeStep:
    """What to send now, and the peer's HELLO once it is trusted."""

    send: bytes | None = None
    peer: Hello | None = None


class Handshake:
    """One side of one exchange. `admit` may veto a peer by raising HandshakeRefused.

    `own` makes this side's HELLO when it is due: an acceptor spends nothing on a peer that has not shown the secret.
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

    def start(self) -> HandshakeStep:
        """The initiator's first frame."""
        self._say_who_we_are()
        return HandshakeStep(send=self._frame(_Kind.HELLO, self._body, _digest(self._body)))

    def receive(self, data: bytes | bytearray) -> HandshakeStep:
        """Take the peer's next frame. Raises HandshakeRefused (also for a REFUSE frame) or WireError."""
        frame = _parse_frame(data)
        kind, body, mac = frame.kind, frame.body, frame.mac
        if kind is _Kind.REFUSE:
            raise HandshakeRefused(body.decode(errors="replace")[:1024])
        if self._initiator and kind is _Kind.HELLO_REPLY and not self._transcript:
            return self._on_reply(body, mac)
        if not self._initiator and kind is _Kind.HELLO and not self._transcript:
            return self._on_hello(body, mac)
        if not self._initiator and kind is _Kind.PROOF and self._peer is not None:
            self._verify(_Kind.PROOF, self._transcript, mac)
            return HandshakeStep(peer=self._peer)
        raise HandshakeRefused(f"unexpected {kind.name} in the handshake")

    def _on_hello(self, body: bytes, mac: bytes) -> HandshakeStep:
        self._verify(_Kind.HELLO, _digest(body), mac)
        peer = decode(body, Hello, MAX_HELLO_BYTES, 2 * MAX_COMPATIBILITY_FIELDS)
        self._admit(peer)
        self._say_who_we_are()
        self._transcript = _digest(body) + _digest(self._body)
        self._peer = peer
        return HandshakeStep(send=self._frame(_Kind.HELLO_REPLY, self._body, self._transcript))

    def _on_reply(self, body: bytes, mac: bytes) -> HandshakeStep:
        transcript = _digest(self._body) + _digest(body)
        self._verify(_Kind.HELLO_REPLY, transcript, mac)
        peer = decode(body, Hello, MAX_HELLO_BYTES, 2 * MAX_COMPATIBILITY_FIELDS)
        self._admit(peer)
        self._transcript = transcript
        return HandshakeStep(send=self._frame(_Kind.PROOF, b"", transcript), peer=peer)

    def _say_who_we_are(self) -> None:
        self._body = pack(replace(self._make_own(), nonce=secrets.token_bytes(_NONCE_BYTES)))

    def _verify(self, kind: _Kind, covered: bytes, mac: bytes) -> None:
        if not hmac.compare_digest(self._mac(kind, covered), mac):
            raise HandshakeRefused("authentication failed: the peers do not share one cluster secret")

    def _mac(self, kind: _Kind, covered: bytes) -> bytes:
        return hmac.digest(self._secret, b"kvbaton-kv:%d:" % kind + covered, "sha256")

    def _frame(self, kind: _Kind, body: bytes, covered: bytes) -> bytes:
        return pack(HandshakeFrame(_MAGIC, PROTOCOL_VERSION, kind, body, self._mac(kind, covered)))


def refusal(reason: str) -> bytes:
    """The frame that tells a peer why it is turned away."""
    return pack(HandshakeFrame(_MAGIC, PROTOCOL_VERSION, _Kind.REFUSE, reason.encode()[:1024], b""))


def check_compatible(own: tuple[tuple[str, str], ...], peer: tuple[tuple[str, str], ...]) -> None:
    """Raises HandshakeRefused that names the first field that differs, with both values."""
    mine, theirs = dict(own), dict(peer)
    for name in (*mine, *(n for n in theirs if n not in mine)):
        here, there = mine.get(name, "absent"), theirs.get(name, "absent")
        if here != there:
            raise HandshakeRefused(f"incompatible engines: {name} is {here!r} here and {there!r} at the peer")


def _parse_frame(data: bytes | bytearray) -> HandshakeFrame:
    """The version is looked at first: what else another one says may have another shape."""
    parts = unpack(data, MAX_HELLO_BYTES, max_items=8)
    if type(parts) is not list or len(parts) < 2 or parts[0] != _MAGIC or type(parts[1]) is not int:
        raise WireError("not a kvbaton handshake")
    if parts[1] != PROTOCOL_VERSION:
        raise HandshakeRefused(
            f"incompatible engines: protocol version is {PROTOCOL_VERSION} here and {parts[1]} at the peer"
        )
    return convert(parts, HandshakeFrame)


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()
