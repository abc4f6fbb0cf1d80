"""The states of a hand-off and of a session, with every legal transition.

Prefill (sender):   OFFERED --grant--> SENDING --posted--> AWAITING_ACK --ack--> DRAINING --drained--> RELEASED
Decode (receiver):  OFFERED --grant--> LANDING --complete--> LANDED --ack--> RELEASED

Every live state may `end` (cancel, failure, lease expiry, lost session): the hand-off then drains. DRAINING means that
operations may still touch its blocks; RELEASED means that none can. A hand-off in DRAINING is what the documents call
quarantined.
"""

from __future__ import annotations

import enum


class IllegalTransition(Exception):
    """A step that the state machine does not know: a bug in the caller or a peer that breaks the protocol."""


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


class SessionState(enum.Enum):
    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


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
    """The state after `step`; raises IllegalTransition."""
    try:
        return _SENDER[state, step]
    except KeyError:
        raise IllegalTransition(f"sender in {state.value} cannot take {step.value}") from None


def next_receiver_state(state: ReceiverState, step: ReceiverStep) -> ReceiverState:
    """The state after `step`; raises IllegalTransition."""
    try:
        return _RECEIVER[state, step]
    except KeyError:
        raise IllegalTransition(f"receiver in {state.value} cannot take {step.value}") from None
