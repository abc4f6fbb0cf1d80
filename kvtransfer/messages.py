"""What a worker and its transfer agent tell each other about hand-offs: commands down, events up.

The life of a hand-off, seen from both engines (P prefill, D decode; -> crosses the wire):

    P  offer(Offer)         -> OFFER  ->   D  Offered            when P starts the prompt
    D  grant(landing)       -> GRANT  ->   P  Granted            D has landing blocks, receives are posted
    P  blocks_ready(..)     -> blocks ->   D  (counted)          whole blocks, while the next chunk computes
    P  finish(payload)      -> DONE   ->   D  Landed             all blocks and DONE have arrived
    D  ack()                -> ACK    ->   P  Released(acked)    P drops its hold
    either  cancel(..)      -> CANCEL ->   other  Failed with the cause; and Released at the one that called it

A block that the agent may still read (P) or have written (D) is its own until `Released` names the hand-off.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import msgspec

MAX_ID_CHARS = 256


class PeerAddress(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where an engine's transfer agent listens. `generation` tells incarnations under one `engine_id` apart."""

    engine_id: Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]
    generation: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    host: Annotated[str, msgspec.Meta(max_length=MAX_ID_CHARS)]
    port: Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]


@dataclass(frozen=True, slots=True)
class HandoffKey:
    """Names one hand-off on both engines. `epoch` is the request's: a resume is a new hand-off."""

    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Offer:
    """Prefill tells decode: the KV of `num_tokens` tokens comes in `num_blocks` blocks (the last may be partial)."""

    key: HandoffKey
    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Landing:
    """Decode's answer: blocks `first_block`.. of the prompt go to `block_ids`, in order; earlier ones it has already.

    `first_block` may equal num_blocks (everything cached): then no block travels.
    """

    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Offered:
    """At decode: a peer offers a hand-off. Answer with `grant` now or later, or `cancel`."""

    offer: Offer
    peer: PeerAddress


@dataclass(frozen=True, slots=True)
class Granted:
    """At prefill: decode has room. For information; the agent sends ready blocks by itself from now on."""

    key: HandoffKey
    first_block: int


@dataclass(frozen=True, slots=True)
class Landed:
    """At decode: every granted block is written and DONE's payload is here. The worker admits the sequence and acks."""

    key: HandoffKey
    payload: bytes


@dataclass(frozen=True, slots=True)
class Released:
    """The agent touches no block of this hand-off any more: prefill's sources or decode's landing blocks may be reused.

    `acked` is True when decode has everything; on a hand-off that failed it follows `Failed` (or this side's `cancel`).
    """

    key: HandoffKey
    acked: bool


class Cause(enum.Enum):
    """What kind of end a hand-off came to before its time. The numbers are the wire's."""

    FAILED = 0
    CANCELLED = 1  # the peer's worker gave it up; nothing is wrong
    FINISHED = 2  # given up because nothing is left to hand over: every sample ended with its first token
    CHECKSUM = 3  # a block that landed here is not what was sent


GivenUp = Literal[Cause.CANCELLED, Cause.FINISHED]  # what a worker may say when it cancels


@dataclass(frozen=True, slots=True)
class Failed:
    """The hand-off will not complete; `Released` follows as soon as no operation can touch the blocks."""

    key: HandoffKey
    reason: str
    cause: Cause = Cause.FAILED


@dataclass(frozen=True, slots=True)
class HandoffCounts:
    """How hand-offs of one engine ended since its start, on either side. `checksum_failures` are among `failed`."""

    acked: int = 0  # as sender
    failed: int = 0  # those given up are not among them
    checksum_failures: int = 0  # as receiver


Event = Offered | Granted | Landed | Released | Failed


class HandoffCommands(Protocol):
    """What a worker may ask: the command half of `TransferAgent`, so that workers can be tested without one.

    Every call is thread-safe, returns at once and is answered by events.
    """

    def offer(self, offer: Offer, peer: PeerAddress) -> None: ...

    def blocks_ready(self, key: HandoffKey, block_ids: Sequence[int]) -> None:
        """The next blocks of the prompt, in order, are written and may be sent."""
        ...

    def finish(self, key: HandoffKey, payload: bytes) -> None:
        """All blocks were announced; `payload` travels with DONE."""
        ...

    def grant(self, key: HandoffKey, landing: Landing) -> None: ...

    def ack(self, key: HandoffKey) -> None: ...

    def cancel(self, key: HandoffKey, reason: str, cause: GivenUp = Cause.CANCELLED) -> None:
        """End a hand-off in any state, on either side; `Released` follows. Unknown keys are ignored.

        The peer hears `Failed` with the cause. FINISHED: nothing is wrong, and nothing is left to hand over.
        """
        ...

    def counts(self) -> HandoffCounts:
        """How hand-offs have ended so far; cheap enough for every step."""
        ...
