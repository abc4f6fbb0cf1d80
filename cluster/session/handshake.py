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
from typing import Any

from kvbaton.cluster.session.messages import (
    KINDS,
    NONCE_BYTES,
    ChallengeMessage,
    HelloMessage,
    ProofMessage,
    RefusedMessage,
    WelcomeMessage,
)
from kvbaton.cluster.session.wire import PROTOCOL_VERSION, Encoder, decode_message, kind_and_fields
from kvbaton.kvtransfer.handshake import HandshakeRefused
from kvbaton.router.engine_info import EngineLoad

_VERSIONED = (KINDS.index(HelloMessage), KINDS.index(ChallengeMessage))


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
        if self._expected_proof is None:
            return self._challenge(_decode(frame, HelloMessage), encoder)
        _check_proof(_decode(frame, ProofMessage).proof, self._expected_proof)
        self.done = True
        return None

    def _challenge(self, hello: HelloMessage, encoder: Encoder) -> bytes:
        self.ingress_id = hello.ingress_id
        nonce = secrets.token_bytes(NONCE_BYTES)
        nonces = hello.nonce + nonce
        self._expected_proof = self._proof(_Side.INGRESS, nonces)
        mine = self._proof(_Side.ENGINE, nonces)
        return encoder.message(ChallengeMessage(PROTOCOL_VERSION, self._engine_id, self._generation, nonce, mine))

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
        return encoder.message(HelloMessage(PROTOCOL_VERSION, self._ingress_id, self._nonce))

    def receive(self, frame: bytes, encoder: Encoder) -> bytes | None:
        """The reply to send, if any; `welcome` is set at the end. Raises `WireError` or `HandshakeRefused`."""
        message = _decode(frame, (WelcomeMessage if self._proved else ChallengeMessage) | RefusedMessage)
        if isinstance(message, RefusedMessage):
            raise HandshakeRefused(message.reason)
        if isinstance(message, ChallengeMessage):
            return self._prove(message, encoder)
        self.welcome = message.load
        return None

    def _prove(self, challenge: ChallengeMessage, encoder: Encoder) -> bytes:
        engine_id, generation = challenge.engine_id, challenge.generation
        if (engine_id, generation) != (self._engine_id, self._generation):
            wanted = f"{self._engine_id} generation {self._generation}"
            raise HandshakeRefused(f"expected engine {wanted}, found {engine_id} generation {generation}")
        nonces = self._nonce + challenge.nonce
        _check_proof(challenge.proof, _proof(self._secret, _Side.ENGINE, nonces, engine_id, generation))
        self._proved = True
        return encoder.message(ProofMessage(_proof(self._secret, _Side.INGRESS, nonces, engine_id, generation)))


def _decode(frame: bytes, allowed: Any) -> Any:
    """The version is looked at first: what else another one says may have another shape."""
    kind, fields = kind_and_fields(frame)
    if kind in _VERSIONED and fields and type(fields[0]) is int and fields[0] != PROTOCOL_VERSION:
        raise HandshakeRefused(f"session protocol version {PROTOCOL_VERSION} here, {fields[0]} there")
    return decode_message(frame, allowed)


def _check_proof(proof: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(proof, expected):
        raise HandshakeRefused("the cluster secrets differ")


def _proof(secret: bytes, side: _Side, nonces: bytes, engine_id: str, generation: int) -> bytes:
    return hmac.digest(secret, f"{side} {generation} {engine_id} ".encode() + nonces, hashlib.sha256)
