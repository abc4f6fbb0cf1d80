"""How an ingress and an engine prove to each other that they share the cluster secret, before anything else is decoded.

    ingress                                   engine
    HELLO(version, ingress id, nonce)    ->
                                         <-   CHALLENGE(version, engine id, generation, nonce, engine's proof)
    PROOF(ingress's proof)               ->
                                         <-   WELCOME(session id, load)

A proof is an HMAC over both nonces, the engine's name and generation, and the side that makes it, so that neither a
recorded nor a reflected one is worth anything. An engine that refuses says why in REFUSED. No I/O here.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets

from kvbaton.cluster.session.fields import WireError, natural, sized, text
from kvbaton.cluster.session.requests import MAX_ID_CHARS
from kvbaton.cluster.session.wire import (
    CHALLENGE,
    HELLO,
    PROOF,
    PROTOCOL_VERSION,
    REFUSED,
    WELCOME,
    Encoder,
    decode_load,
    unpack,
)
from kvbaton.router.engine_info import EngineLoad

NONCE_BYTES = 32
MAX_HANDSHAKE_BYTES = 2048  # no frame may be longer before the proof


class HandshakeRefused(Exception):
    """The two ends must not talk; the message says what differs. Safe to show to the other end."""


class _Side(enum.StrEnum):
    ENGINE = "engine"
    INGRESS = "ingress"


class EngineHandshake:
    """The engine's half. Feed it frames until `done`."""

    def __init__(self, secret: bytes, engine_id: str, generation: int) -> None:
        self._secret = secret
        self._engine_id = engine_id
        self._generation = generation
        self._expected_proof: bytes | None = None
        self.ingress_id = ""
        self.done = False

    def receive(self, frame: bytes, encoder: Encoder) -> bytes | None:
        """The reply to send, if any. Raises `WireError` or `HandshakeRefused`."""
        kind, fields = unpack(frame)
        if self._expected_proof is None:
            return self._challenge(kind, fields, encoder)
        if kind != PROOF:
            raise WireError(f"expected a proof, got message kind {kind}")
        (proof,) = sized("proof", fields, 1)
        if type(proof) is not bytes or not hmac.compare_digest(proof, self._expected_proof):
            raise HandshakeRefused("the cluster secrets differ")
        self.done = True
        return None

    def _challenge(self, kind: int, fields: list[object], encoder: Encoder) -> bytes:
        if kind != HELLO:
            raise WireError(f"expected a hello, got message kind {kind}")
        version, ingress_id, ingress_nonce = sized("hello", fields, 3)
        _check_version(version)
        self.ingress_id = text("ingress id", ingress_id, MAX_ID_CHARS)
        nonce = secrets.token_bytes(NONCE_BYTES)
        nonces = _nonce(ingress_nonce) + nonce
        self._expected_proof = self._proof(_Side.INGRESS, nonces)
        mine = self._proof(_Side.ENGINE, nonces)
        return encoder.message(CHALLENGE, PROTOCOL_VERSION, self._engine_id, self._generation, nonce, mine)

    def _proof(self, side: _Side, nonces: bytes) -> bytes:
        return _proof(self._secret, side, nonces, self._engine_id, self._generation)


class IngressHandshake:
    """The ingress's half: knows whom it means to reach and refuses anybody else."""

    def __init__(self, secret: bytes, ingress_id: str, engine_id: str, generation: int) -> None:
        self._secret = secret
        self._ingress_id = ingress_id
        self._engine_id = engine_id
        self._generation = generation
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._proved = False
        self.welcome: EngineLoad | None = None

    def hello(self, encoder: Encoder) -> bytes:
        return encoder.message(HELLO, PROTOCOL_VERSION, self._ingress_id, self._nonce)

    def receive(self, frame: bytes, encoder: Encoder) -> bytes | None:
        """The reply to send, if any; `welcome` is set at the end. Raises `WireError` or `HandshakeRefused`."""
        kind, fields = unpack(frame)
        if kind == REFUSED:
            (reason,) = sized("refusal", fields, 1)
            raise HandshakeRefused(text("refusal", reason, MAX_HANDSHAKE_BYTES))
        if kind == CHALLENGE and not self._proved:
            return self._prove(fields, encoder)
        if kind != WELCOME or not self._proved:
            raise WireError(f"unexpected message kind {kind} in the handshake")
        _, load = sized("welcome", fields, 2)
        self.welcome = decode_load(load)
        return None

    def _prove(self, fields: list[object], encoder: Encoder) -> bytes:
        version, engine_id, generation, nonce, proof = sized("challenge", fields, 5)
        _check_version(version)
        engine_id, generation = text("engine id", engine_id, MAX_ID_CHARS), natural("generation", generation)
        if (engine_id, generation) != (self._engine_id, self._generation):
            wanted = f"{self._engine_id} generation {self._generation}"
            raise HandshakeRefused(f"expected engine {wanted}, found {engine_id} generation {generation}")
        nonces = self._nonce + _nonce(nonce)
        expected = _proof(self._secret, _Side.ENGINE, nonces, engine_id, generation)
        if type(proof) is not bytes or not hmac.compare_digest(proof, expected):
            raise HandshakeRefused("the cluster secrets differ")
        self._proved = True
        return encoder.message(PROOF, _proof(self._secret, _Side.INGRESS, nonces, engine_id, generation))


def _check_version(version: object) -> None:
    if version != PROTOCOL_VERSION:
        raise HandshakeRefused(f"session protocol version {PROTOCOL_VERSION} here, {version!r:.20} there")


def _nonce(value: object) -> bytes:
    if type(value) is not bytes or len(value) != NONCE_BYTES:
        raise WireError(f"a nonce is {NONCE_BYTES} bytes")
    return value


def _proof(secret: bytes, side: _Side, nonces: bytes, engine_id: str, generation: int) -> bytes:
    return hmac.digest(secret, f"{side} {generation} {engine_id} ".encode() + nonces, hashlib.sha256)
