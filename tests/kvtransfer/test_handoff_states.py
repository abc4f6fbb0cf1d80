"""Guards the tables: each legal step leads where the drawing says, every other step is refused."""

from __future__ import annotations

import itertools

import pytest

from kvbaton.kvtransfer.handoff import (
    HandoffStateError,
    ReceiverState,
    ReceiverStep,
    SenderState,
    SenderStep,
    next_receiver_state,
    next_sender_state,
)

S, D = SenderState, ReceiverState

SENDER = {
    (S.OFFERED, SenderStep.GRANT): S.SENDING,
    (S.SENDING, SenderStep.POSTED): S.AWAITING_ACK,
    (S.AWAITING_ACK, SenderStep.ACK): S.DRAINING,
    (S.OFFERED, SenderStep.END): S.DRAINING,
    (S.SENDING, SenderStep.END): S.DRAINING,
    (S.AWAITING_ACK, SenderStep.END): S.DRAINING,
    (S.DRAINING, SenderStep.DRAINED): S.RELEASED,
}
RECEIVER = {
    (D.OFFERED, ReceiverStep.GRANT): D.LANDING,
    (D.LANDING, ReceiverStep.COMPLETE): D.LANDED,
    (D.LANDED, ReceiverStep.ACK): D.RELEASED,
    (D.OFFERED, ReceiverStep.END): D.DRAINING,
    (D.LANDING, ReceiverStep.END): D.DRAINING,
    (D.LANDED, ReceiverStep.END): D.DRAINING,
    (D.DRAINING, ReceiverStep.DRAINED): D.RELEASED,
}


@pytest.mark.parametrize(("state", "step"), list(itertools.product(SenderState, SenderStep)))
def test_sender_steps(state: SenderState, step: SenderStep) -> None:
    if (state, step) in SENDER:
        assert next_sender_state(state, step) is SENDER[state, step]
    else:
        with pytest.raises(HandoffStateError, match=f"{state.value} cannot take {step.value}"):
            next_sender_state(state, step)


@pytest.mark.parametrize(("state", "step"), list(itertools.product(ReceiverState, ReceiverStep)))
def test_receiver_steps(state: ReceiverState, step: ReceiverStep) -> None:
    if (state, step) in RECEIVER:
        assert next_receiver_state(state, step) is RECEIVER[state, step]
    else:
        with pytest.raises(HandoffStateError, match=f"{state.value} cannot take {step.value}"):
            next_receiver_state(state, step)
