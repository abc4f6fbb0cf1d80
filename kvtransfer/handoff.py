"""What the two sides of a hand-off share: their states with every legal step, and what they need of their session.

Prefill (sender.py):   OFFERED --grant--> SENDING --posted--> AWAITING_ACK --ack--> DRAINING --drained--> RELEASED
Decode (receiver.py):  OFFERED --grant--> LANDING --complete--> LANDED --ack--> RELEASED

Every live state may `end` (cancel, failure, lease expiry, lost session): the hand-off then drains. DRAINING means that
operations may still touch its blocks; RELEASED means that none can. A hand-off in DRAINING is what the documents call
quarantined.
"""

from __future__ import annotations

import enum
from typing import Protocol

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.messages import Event, HandoffKey
from kvbaton.kvtransfer.send_window import BlockSource
from kvbaton.kvtransfer.transport import Operation
from kvbaton.kvtransfer.wire import Handle, Message


class HandoffStateError(Exception):
    """A step that the hand-off's state does not allow: a bug in the caller, or a peer that breaks the protocol."""


class SenderState(enum.Enum):
    OFFERED = "offered"
    SENDING = "sending"
    AWAITING_ACK = "awaiting_ack"
    DRAINING = "draining"
    RELEASED = "released"


class SenderStep(enum.Enum):
    GRANT = "grant"
    POSTED = "posted"  # finish() was called and every granted block is handed to the transport
    ACK = "ack"
    END = "end"
    DRAINED = "drained"


class ReceiverState(enum.Enum):
    OFFERED = "offered"
    LANDING = "landing"
    LANDED = "landed"
    DRAINING = "draining"
    RELEASED = "released"


class ReceiverStep(enum.Enum):
    GRANT = "grant"
    COMPLETE = "complete"  # every granted block and DONE are here
    ACK = "ack"
    END = "end"
    DRAINED = "drained"


_SENDER = {
    (SenderState.OFFERED, SenderStep.GRANT): SenderState.SENDING,
    (SenderState.SENDING, SenderStep.POSTED): SenderState.AWAITING_ACK,
    (SenderState.AWAITING_ACK, SenderStep.ACK): SenderState.DRAINING,
    (SenderState.OFFERED, SenderStep.END): SenderState.DRAINING,
    (SenderState.SENDING, SenderStep.END): SenderState.DRAINING,
    (SenderState.AWAITING_ACK, SenderStep.END): SenderState.DRAINING,
    (SenderState.DRAINING, SenderStep.DRAINED): SenderState.RELEASED,
}

_RECEIVER = {
    (ReceiverState.OFFERED, ReceiverStep.GRANT): ReceiverState.LANDING,
    (ReceiverState.LANDING, ReceiverStep.COMPLETE): ReceiverState.LANDED,
    (ReceiverState.LANDED, ReceiverStep.ACK): ReceiverState.RELEASED,
    (ReceiverState.OFFERED, ReceiverStep.END): ReceiverState.DRAINING,
    (ReceiverState.LANDING, ReceiverStep.END): ReceiverState.DRAINING,
    (ReceiverState.LANDED, ReceiverStep.END): ReceiverState.DRAINING,
    (ReceiverState.DRAINING, ReceiverStep.DRAINED): ReceiverState.RELEASED,
}


def next_sender_state(state: SenderState, step: SenderStep) -> SenderState:
    """The state after `step`; raises HandoffStateError."""
    try:
        return _SENDER[state, step]
    except KeyError:
        raise HandoffStateError(f"sender in {state.value} cannot take {step.value}") from None


def next_receiver_state(state: ReceiverState, step: ReceiverStep) -> ReceiverState:
    """The state after `step`; raises HandoffStateError."""
    try:
        return _RECEIVER[state, step]
    except KeyError:
        raise HandoffStateError(f"receiver in {state.value} cannot take {step.value}") from None


def key_of(handle: Handle) -> HandoffKey:
    """The workers' name of a hand-off."""
    return HandoffKey(handle.request_id, handle.epoch)


class HandoffLink(Protocol):
    """The session, as its hand-offs see it; a recording one drives the state machines in tests."""

    @property
    def sums(self) -> BlockSums | None:
        """How blocks are summed; None where they are not."""
        ...

    def send(self, message: Message) -> None:
        """Queue a control message to the peer."""
        ...

    def emit(self, event: Event) -> None:
        """Tell the worker."""
        ...

    def queue_block(self, source: BlockSource, index: int) -> None:
        """Send block `index` of the prompt, or its abort, when the window has room."""
        ...

    def first_tag(self, handle: Handle, count: int) -> int:
        """Reserve `count` tags for the receives of `handle`, which is polled from now on; the rest follow the first."""
        ...

    def post_receive(self, tag: int, block_id: int) -> Operation: ...

    def failure(self, operation: Operation) -> str | None: ...

    def received(self, count: int) -> None:
        """Count completed receives."""
        ...

    def alive(self) -> bool:
        """Ask the connection itself, now: False once the peer has hung up."""
        ...

    def drains(self) -> None:
        """A hand-off waits for the peer to end its operations: ask for a sign of life, which comes at once."""
        ...

    def forget(self, handle: Handle) -> None:
        """The hand-off is RELEASED."""
        ...
