"""What ingress and engine say to each other: the declared messages of the session plane, and their limits.

    to the engine    SUBMIT, ABORT, MIGRATE, BEAT
    to the ingress   STEP (the engine's load and a row for each token), MIGRATED, MIGRATION_WANTED
    handshake        HELLO, PROOF; CHALLENGE, WELCOME, REFUSED (handshake.py)

Values that travel as they are (tokens, load, sampling, migrations) are declared where they belong; the ones here exist
on the wire only. A prompt travels as bytes, 32 bits a token, because it may have a hundred thousand.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from kvbaton.engine.orders import LegKind, Migrate, Migrated, MigrationWanted, Submit
from kvbaton.engine.request import (
    MAX_ID_CHARS,
    MAX_LIST,
    MAX_SAMPLES,
    InvalidRequest,
    Natural,
    Request,
    RequestId,
    SampleIndex,
    SamplingParams,
    TokenOutput,
)
from kvbaton.kvtransfer.codec import WireError
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineLoad

MAX_SALT_CHARS = 4096
MAX_TIMEOUT_S = 7 * 86400.0
MAX_HANDSHAKE_BYTES = 2048  # no frame may be longer before the proof
NONCE_BYTES = 32
RESUME_SUFFIX_CHARS = 32  # what a resume may add to a request id

_Name = Annotated[str, Meta(max_length=MAX_ID_CHARS)]
_Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]


class HelloMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`version` stands first here and in CHALLENGE whatever the version."""

    version: int
    ingress_id: _Name
    nonce: _Nonce


class ChallengeMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    engine_id: _Name
    generation: Natural
    nonce: _Nonce
    proof: bytes


class ProofMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    proof: bytes


class WelcomeMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    session_id: Natural
    load: EngineLoad


class RefusedMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=MAX_HANDSHAKE_BYTES)]


class SubmitMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A `Submit` with its request's tokens as bytes."""

    kind: LegKind
    peer: PeerAddress | None
    request_id: RequestId
    prompt: bytes
    sampling: SamplingParams
    sample_indices: Annotated[tuple[SampleIndex, ...], Meta(min_length=1, max_length=MAX_SAMPLES)]
    emitted: bytes
    epoch: Natural
    cache_salt: Annotated[str, Meta(max_length=MAX_SALT_CHARS)]
    timeout_s: float | None

    @classmethod
    def of(cls, submit: Submit) -> SubmitMessage:
        """Raises `OverflowError` for a token id that is no unsigned 32-bit number."""
        request = submit.request
        return cls(
            submit.kind,
            submit.peer,
            request.request_id,
            _token_bytes(request.prompt),
            request.sampling,
            request.sample_indices,
            _token_bytes(request.emitted),
            request.epoch,
            request.cache_salt,
            request.timeout_s,
        )

    def submit(self) -> Submit:
        """The inverse of `of`. Raises `WireError`."""
        request = Request(
            request_id=self.request_id,
            prompt=_tokens("prompt", self.prompt),
            sampling=self.sampling,
            sample_indices=self.sample_indices,
            emitted=_tokens("emitted", self.emitted),
            epoch=self.epoch,
            cache_salt=self.cache_salt,
            timeout_s=self.timeout_s,
        )
        return Submit(request, self.kind, self.peer)


class AbortMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`sample` None: all of them."""

    request_id: RequestId
    sample: SampleIndex | None


class BeatMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The ingress lives. An engine sends a STEP without rows instead."""


class StepMessage(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    load: EngineLoad
    outputs: list[TokenOutput]

    def __post_init__(self) -> None:
        for output in self.outputs:
            if output.token_id is None and output.finish is None:
                raise ValueError(f"a row without a token_id must have a finish: {output.request_id}")


ToEngine = SubmitMessage | AbortMessage | Migrate | BeatMessage
ToIngress = StepMessage | Migrated | MigrationWanted

# A message's kind is its place here. The first five keep theirs for ever: versions refuse each other by name with them.
KINDS: tuple[type[Struct], ...] = (
    HelloMessage,
    ChallengeMessage,
    ProofMessage,
    WelcomeMessage,
    RefusedMessage,
    SubmitMessage,
    AbortMessage,
    BeatMessage,
    StepMessage,
    Migrate,
    Migrated,
    MigrationWanted,
)


def check_sendable(request: Request) -> None:
    """Raise `InvalidRequest` for what an engine would refuse as malformed: there it costs the session, here one reply.

    Values a client may choose freely are the point; ranges are `SamplingParams.check`'s business.
    """
    _check_text("request_id", request.request_id, MAX_ID_CHARS - RESUME_SUFFIX_CHARS)
    _check_text("cache_salt", request.cache_salt, MAX_SALT_CHARS)
    for name in ("logit_bias", "stop_token_ids"):
        entries = len(getattr(request.sampling, name))
        if entries > MAX_LIST:
            raise InvalidRequest(f"{name} has {entries} entries; at most {MAX_LIST} are allowed", name)
    if request.timeout_s is not None and not 0 < request.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout must be above 0 and at most {MAX_TIMEOUT_S:g} seconds", "timeout")
    context = request.context
    if context and not 0 <= min(context) <= max(context) < 1 << 32:
        raise InvalidRequest("token ids must be integers in [0, 4294967296)", "prompt")


def _check_text(name: str, value: str, max_chars: int) -> None:
    if len(value) > max_chars:
        raise InvalidRequest(f"{name} has {len(value)} characters; at most {max_chars} are allowed", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} is not valid Unicode", name) from None


def _token_bytes(tokens: Sequence[int]) -> bytes:
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _tokens(name: str, value: bytes) -> tuple[int, ...]:
    if len(value) % 4:
        raise WireError(f"{name} must be bytes of 32-bit token ids")
    tokens = array("I", value)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)
