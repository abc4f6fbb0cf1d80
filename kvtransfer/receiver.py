"""Decode's side of one hand-off.

`grant` posts a receive for every landing block before GRANT leaves, so blocks land in the pool with no copy and in any
order. A landing block belongs to the agent until `Landed` (then it is the worker's) or `Released` (then nobody can
write it: each receive has completed, with data or with the sender's abort, or the channel is closed).

`Landed` is the last word to the worker: a peer that cancels or dies after it changes nothing here, because every byte
has arrived and, with checksums on, is what was sent. It is given only after the connection was seen alive behind the
last block: a prefill engine that gave its blocks up has closed the connection first, so what it overwrote later is
never taken for KV.
"""

from __future__ import annotations

from collections import deque

from kvbaton.kvtransfer.checksum import LandingCheck
from kvbaton.kvtransfer.handoff import (
    HandoffLink,
    HandoffStateError,
    ReceiverState,
    ReceiverStep,
    key_of,
    next_receiver_state,
)
from kvbaton.kvtransfer.messages import Cause, Failed, GivenUp, Landed, Landing, Offer, Released
from kvbaton.kvtransfer.transport import Operation
from kvbaton.kvtransfer.wire import (
    AckMessage,
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    GrantMessage,
    Handle,
    SumsMessage,
)


class ReceiveHandoff:
    """Created by OFFER; gone after ack or Released."""

    def __init__(self, handle: Handle, offer: Offer, link: HandoffLink) -> None:
        self.handle = handle
        self.offer = offer
        self.state = ReceiverState.OFFERED
        self.landing = Landing(offer.num_blocks, ())
        self.draining_since = 0.0
        self._link = link
        self._receives: deque[Operation] = deque()
        self._announced = 0  # prompt blocks below this index are on their way or not wanted
        self._moved_at = 0.0  # when a block was last announced or received
        self._payload: bytes | None = None
        self._check: LandingCheck | None = None  # from the grant on, with checksums

    # commands

    def grant(self, landing: Landing) -> None:
        """`landing` must cover the offer's tail; the agent has checked its block ids."""
        self.state = next_receiver_state(self.state, ReceiverStep.GRANT)
        self.landing = landing
        self._check = None if self._link.sums is None else LandingCheck(self._link.sums, landing)
        self._announced = landing.first_block
        first_tag = self._link.first_tag(self.handle, len(landing.block_ids))
        for tag, block_id in enumerate(landing.block_ids, first_tag):
            self._receives.append(self._link.post_receive(tag, block_id))
        self._link.send(GrantMessage(self.handle, first_tag, landing.first_block, len(landing.block_ids)))

    def ack(self, now: float) -> None:
        """The worker has taken the sequence over."""
        if self.state is not ReceiverState.LANDED:
            self.fail(f"acknowledged while {self.state.value}", now)
            return
        self.state = next_receiver_state(self.state, ReceiverStep.ACK)
        self._link.send(AckMessage(self.handle))
        self._link.forget(self.handle)

    def cancel(self, reason: str, now: float, cause: GivenUp = Cause.CANCELLED) -> None:
        """Given up by this engine's worker, which hears only Released; the peer hears why."""
        if self.live:
            self._link.send(CancelMessage(self.handle, reason, cause))
            self._end(now)

    # what the peer says

    def on_blocks(self, message: BlocksMessage, now: float) -> None:
        self._require_landing("BLOCKS")
        end = message.first_block + message.count
        if message.first_block != self._announced or end > self.offer.num_blocks:
            self.fail(f"blocks {message.first_block}..{end - 1} announced, {self._announced} is next", now)
            return
        self._announced = end
        self._moved_at = now

    def on_sums(self, message: SumsMessage, now: float) -> None:
        self._require_landing("SUMS")
        end = message.first_block + len(message.sums)
        if self._check is None:
            self.fail("checksums came where none were agreed", now)
        elif message.first_block != self._check.next_sum or end > self._announced:
            self.fail(f"checksums of blocks {message.first_block}..{end - 1}, {self._check.next_sum} is next", now)
        else:
            self._check.expect(message.sums)
            self._moved_at = now
            self._verify(now)
            self.poll(now)

    def on_done(self, message: DoneMessage, now: float) -> None:
        self._require_landing("DONE")
        if self._announced != self.offer.num_blocks or message.num_sent != len(self.landing.block_ids):
            self.fail(f"done after {message.num_sent} of {len(self.landing.block_ids)} granted blocks", now)
            return
        self._payload = message.payload
        self.poll(now)

    def on_peer_end(self, reason: str, now: float, cause: Cause = Cause.FAILED) -> None:
        """CANCEL or FAIL has arrived."""
        if self.live and self.state is not ReceiverState.LANDED:
            self._link.emit(Failed(key_of(self.handle), reason, cause))
            self._end(now)

    # the session

    @property
    def live(self) -> bool:
        return self.state not in (ReceiverState.DRAINING, ReceiverState.RELEASED)

    @property
    def receiving(self) -> bool:
        """Posted receives are outstanding."""
        return bool(self._receives)

    def poll(self, now: float) -> bool:
        """Take completed receives, in posting order; True if there was one."""
        taken = 0
        while self._receives and self._receives[0].completed:
            failure = self._link.failure(self._receives.popleft())
            taken += 1
            if failure is not None:
                self.fail(f"receive failed: {failure}", now)
        if taken:
            self._moved_at = now
            self._link.received(taken)
            self._verify(now)
        if not self._receives:
            self._land_or_release()
        return taken > 0

    def on_tick(self, now: float, stall_s: float) -> None:
        missing = self._announced - self.landing.first_block - self._num_good()
        if self.state is ReceiverState.LANDING and missing > 0 and now - self._moved_at >= stall_s:
            self.fail(f"stalled: {missing} announced blocks, none came whole in {stall_s} s", now)

    def fail(self, reason: str, now: float, cause: Cause = Cause.FAILED) -> None:
        """Failed here: the peer is told, the worker is told."""
        if self.live and self.state is not ReceiverState.LANDED:
            self._link.send(FailMessage(self.handle, reason))
            self.on_peer_end(reason, now, cause)

    def on_lost(self, reason: str, now: float) -> None:
        """The channel is closed: nothing writes the blocks any more."""
        self._receives.clear()
        self.on_peer_end(reason, now)
        self._land_or_release()

    def _verify(self, now: float) -> None:
        """Compare what has landed with the checksums that have come."""
        if self._check is None or self.state is not ReceiverState.LANDING:
            return
        if (wrong := self._check.mismatch(self._num_landed())) is not None:
            self.fail(wrong, now, Cause.CHECKSUM)

    def _num_landed(self) -> int:
        return len(self.landing.block_ids) - len(self._receives)

    def _num_good(self) -> int:
        return self._num_landed() if self._check is None else self._check.checked

    def _landed_whole(self) -> bool:
        return self.state is ReceiverState.LANDING and self._num_good() == len(self.landing.block_ids)

    def _land_or_release(self) -> None:
        if self.state is ReceiverState.DRAINING:
            self.state = next_receiver_state(self.state, ReceiverStep.DRAINED)
            self._link.forget(self.handle)
            self._link.emit(Released(key_of(self.handle), acked=False))
        elif self._payload is not None and self._landed_whole() and self._link.alive():
            self.state = next_receiver_state(self.state, ReceiverStep.COMPLETE)
            self._link.emit(Landed(key_of(self.handle), self._payload))

    def _end(self, now: float) -> None:
        self.state = next_receiver_state(self.state, ReceiverStep.END)
        self.draining_since = now
        if not self._receives:
            self._land_or_release()
        else:
            self._link.drains()

    def _require_landing(self, what: str) -> None:
        if self.state is not ReceiverState.LANDING:
            raise HandoffStateError(f"{what} for a hand-off that is {self.state.value}")
