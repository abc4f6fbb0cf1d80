"""Prefill's side of one hand-off.

It offers, waits for the grant, sends each block as soon as it is both ready and granted, sends DONE once everything is
queued, and holds the source blocks until ACK. Every granted block is answered with exactly one message, its data or an
empty abort, so the receives that decode posted always complete while the session lives, however the hand-off ends.
`Released` is withheld until no queued or running send can read a block.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.kvtransfer.checksum import OutgoingSums
from kvbaton.kvtransfer.handoff import (
    HandoffLink,
    HandoffStateError,
    SenderState,
    SenderStep,
    key_of,
    next_sender_state,
)
from kvbaton.kvtransfer.messages import Cause, Failed, GivenUp, Granted, Offer, Released
from kvbaton.kvtransfer.wire import (
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    GrantMessage,
    Handle,
    OfferMessage,
    SumsMessage,
)


class SendHandoff:
    """Created by offer(), gone after Released. Implements BlockSource. `now` is in seconds on the agent's clock."""

    def __init__(self, handle: Handle, offer: Offer, link: HandoffLink, lease_s: float, now: float) -> None:
        self.handle = handle
        self.offer = offer
        self.state = SenderState.OFFERED
        self.lease_until = now + lease_s
        self.draining_since = 0.0
        self._lease_s = lease_s
        self._link = link
        self._blocks: list[int] = []
        self._payload: bytes | None = None
        self._grant: GrantMessage | None = None
        self._queued = 0  # prompt blocks below this index are queued, sent, or not wanted
        self._outstanding = 0  # queued or running sends and aborts
        self._acked = False
        self._sums = OutgoingSums()

    def start(self) -> None:
        self._link.send(OfferMessage(self.handle, self.offer.num_tokens, self.offer.num_blocks))

    # commands

    def blocks_ready(self, block_ids: Sequence[int], now: float) -> None:
        """The next blocks of the prompt, in order."""
        if not self.live:
            return
        self._blocks.extend(block_ids)
        if len(self._blocks) > self.offer.num_blocks:
            self.fail(f"{len(self._blocks)} blocks were made ready, {self.offer.num_blocks} were offered", now)
            return
        self._queue_ready()

    def finish(self, payload: bytes, now: float) -> None:
        """No block follows; `payload` goes with DONE."""
        if not self.live:
            return
        if len(self._blocks) != self.offer.num_blocks:
            self.fail(f"finished with {len(self._blocks)} of {self.offer.num_blocks} blocks", now)
            return
        self._payload = payload
        self._finish_if_queued()

    def cancel(self, reason: str, now: float, cause: GivenUp = Cause.CANCELLED) -> None:
        """Given up by this engine's worker, which hears only Released; the peer hears why."""
        if self.live:
            self._link.send(CancelMessage(self.handle, reason, cause))
            self._end(now)

    # what the peer says

    def on_grant(self, grant: GrantMessage, now: float) -> None:
        if grant.first_block + grant.count != self.offer.num_blocks:
            self.fail(f"grant of {grant.first_block}+{grant.count} blocks for an offer of {self.offer.num_blocks}", now)
            return
        self.state = next_sender_state(self.state, SenderStep.GRANT)
        self.renew(now)
        self._grant = grant
        self._queued = grant.first_block
        self._link.emit(Granted(key_of(self.handle), grant.first_block))
        self._queue_ready()
        self._finish_if_queued()

    def on_ack(self, now: float) -> None:
        self.state = next_sender_state(self.state, SenderStep.ACK)
        self._acked = True
        self.draining_since = now
        self._release_if_drained()

    def on_peer_end(self, reason: str, now: float, cause: Cause = Cause.FAILED) -> None:
        """CANCEL or FAIL has arrived."""
        if self.live:
            self._link.emit(Failed(key_of(self.handle), reason, cause))
            self._end(now)

    def renew(self, now: float) -> None:
        self.lease_until = now + self._lease_s

    # the session

    @property
    def live(self) -> bool:
        return self.state not in (SenderState.DRAINING, SenderState.RELEASED)

    @property
    def granted(self) -> bool:
        return self._grant is not None

    @property
    def num_blocks_held(self) -> int:
        return len(self._blocks)

    def source(self, index: int) -> int | None:
        """The block to send for prompt index `index`, or None to send its abort."""
        return self._blocks[index] if self.live else None

    def tag(self, index: int) -> int:
        if self._grant is None:
            raise HandoffStateError("no block may travel before the grant")
        return self._grant.first_tag + index - self._grant.first_block

    def on_posted(self, index: int, value: int) -> None:
        """Block `index` is being sent and has the checksum `value`."""
        self._sums.add(index, value)
        if self._sums.full or index + 1 == self._queued:
            self._link.send(SumsMessage(self.handle, *self._sums.take()))

    def on_sent(self, failure: str | None, now: float) -> None:
        """One queued send or abort has completed."""
        self._outstanding -= 1
        if failure is not None:
            self.fail(f"send failed: {failure}", now)
        self._release_if_drained()

    def on_tick(self, now: float) -> None:
        if self.live and now >= self.lease_until:
            self.fail(f"lease of {self._lease_s} s expired: decode has not renewed it", now)

    def fail(self, reason: str, now: float) -> None:
        """Failed here: the peer is told, the worker is told."""
        if self.live:
            self._link.send(FailMessage(self.handle, reason))
            self.on_peer_end(reason, now)

    def on_lost(self, reason: str, now: float) -> None:
        """The channel is closed: nothing reads the blocks any more."""
        self._outstanding = 0
        self._grant = None
        self.on_peer_end(reason, now)
        self._release_if_drained()

    def _queue_ready(self) -> None:
        if self._grant is None or len(self._blocks) <= self._queued:
            return
        first, end = self._queued, len(self._blocks)
        self._link.send(BlocksMessage(self.handle, first, end - first))
        self._queue(end)

    def _queue(self, end: int) -> None:
        for index in range(self._queued, end):
            self._outstanding += 1
            self._link.queue_block(self, index)
        self._queued = end

    def _finish_if_queued(self) -> None:
        if self.state is SenderState.SENDING and self._payload is not None and self._grant is not None:
            self.state = next_sender_state(self.state, SenderStep.POSTED)
            self._link.send(DoneMessage(self.handle, self._grant.count, self._payload))

    def _end(self, now: float) -> None:
        self.state = next_sender_state(self.state, SenderStep.END)
        self.draining_since = now
        if self._grant is not None:
            self._queue(self.offer.num_blocks)
        if self._outstanding:
            self._link.drains()
        self._release_if_drained()

    def _release_if_drained(self) -> None:
        if self.state is SenderState.DRAINING and self._outstanding == 0:
            self.state = next_sender_state(self.state, SenderStep.DRAINED)
            self._link.forget(self.handle)
            self._link.emit(Released(key_of(self.handle), self._acked))
