"""One connection to one peer and the hand-offs on it: handshake, dispatch, send window, leases, end.

The side that connects offers; the side that accepts receives. Two engines that offer to each other hold two sessions.

    CONNECTING --handshake done--> OPEN --close(reason)--> CLOSED

Whatever ends a session closes its channel first, which ends every operation on it, and only then fails and releases its
hand-offs.
"""

from __future__ import annotations

import enum
import logging
import secrets
from collections.abc import Callable, Iterable

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.codec import WireError
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.handoff import HandoffStateError, key_of
from kvbaton.kvtransfer.handshake import Handshake, HandshakeRefused, HandshakeStep, refusal
from kvbaton.kvtransfer.messages import Cause, Event, Offer, Offered, PeerAddress
from kvbaton.kvtransfer.open_handoffs import OpenHandoffs
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.send_window import BlockSource, LateGrants, SendWindow
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.stats import LinkMeter, PeerStats, Traffic
from kvbaton.kvtransfer.transport import Channel, Operation, TransportError
from kvbaton.kvtransfer.wire import (
    BLOCK_TAG,
    MAX_RENEW_HANDLES,
    AckMessage,
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    FrameNumbers,
    GrantMessage,
    Handle,
    Message,
    OfferMessage,
    RenewMessage,
    SumsMessage,
)

log = logging.getLogger(__name__)


class SessionState(enum.Enum):
    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


class Session:
    """Used on the agent's thread alone, but for its numbers. Implements HandoffLink for its hand-offs.

    `generation` is this engine's. `on_open` is called once the peer is authenticated, before anything that it asks for.
    """

    def __init__(
        self,
        channel: Channel,
        handshake: Handshake,
        generation: int,
        settings: TransferConfig,
        handoffs: OpenHandoffs,
        on_open: Callable[[Session, PeerAddress], None],
        now: float,
    ) -> None:
        self.channel = channel
        self.state = SessionState.CONNECTING
        self.peer: PeerAddress | None = None
        self.senders: dict[Handle, SendHandoff] = {}
        self.receivers: dict[Handle, ReceiveHandoff] = {}
        self._handshake = handshake
        self._settings = settings
        self._handoffs = handoffs
        self._on_open = on_open
        self._now = now
        self._heard = now
        self._renew_at = now
        self._frames = FrameNumbers(generation, settings.max_payload_bytes)
        self._backlog: list[Message] = []
        self._meter = LinkMeter()
        self._window = SendWindow(channel, handoffs.block_bytes, settings.send_window, self._meter, handoffs.sums)
        self._landing: dict[Handle, ReceiveHandoff] = {}
        self._late_grants = LateGrants()
        self._next_tag = BLOCK_TAG | secrets.randbits(62)  # tags of one session never repeat and cannot be guessed
        self._num_messages = 0
        self._num_blocks_received = 0

    # life

    def start(self) -> None:
        """The initiator's HELLO."""
        self._take_step(self._handshake.start())

    @property
    def closed(self) -> bool:
        return self.state is SessionState.CLOSED

    @property
    def busy(self) -> bool:
        """Blocks are moving."""
        return bool(self._window or self._landing)

    @property
    def has_handoffs(self) -> bool:
        return bool(self.senders or self.receivers)

    def poll(self, now: float) -> bool:
        """Take what the channel has, move blocks; True if anything happened."""
        self._now = now
        worked = False
        try:
            while not self.closed and (data := self.channel.receive()) is not None:
                self._take(data)
                worked = True
            if self.state is SessionState.OPEN:
                worked |= self._move_blocks()
        except HandshakeRefused as refused:
            self._refuse(str(refused))
        except (WireError, TransportError) as error:
            self._refuse(f"protocol error: {error}")
        if not self.closed and (reason := self.channel.lost()) is not None:
            self.close(f"connection lost: {reason}")
        return worked

    def tick(self, now: float) -> None:
        """Timers: handshake deadline, renewals, leases, drains, silence."""
        self._now = now
        settings = self._settings
        if self.state is SessionState.CONNECTING:
            if now - self._heard >= settings.connect_s:
                self.close(f"no handshake within {settings.connect_s} s")
            return
        self._warn_if_slow()
        for sender in list(self.senders.values()):
            sender.on_tick(now)
        for receiver in list(self.receivers.values()):
            receiver.on_tick(now, settings.stall_s)
        if now >= self._renew_at:
            self._renew()
        draining = [h.draining_since for h in self._all_handoffs() if not h.live]
        if any(now - since >= settings.drain_s for since in draining):
            self.close(f"peer has not finished its operations within {settings.drain_s} s")
        elif any(now - since >= settings.answer_s and since > self._heard for since in draining):
            self.close(f"peer has not answered within {settings.answer_s} s")
        elif self.has_handoffs and now - self._heard >= settings.lease_s:
            self.close(f"peer has been silent for {settings.lease_s} s")

    def close(self, reason: str) -> None:
        """End the session and all it holds. Idempotent."""
        if self.closed:
            return
        self.state = SessionState.CLOSED
        self.channel.close()
        self._window.clear()
        self._landing.clear()
        for sender in list(self.senders.values()):
            sender.on_lost(reason, self._now)
        for receiver in list(self.receivers.values()):
            receiver.on_lost(reason, self._now)
        log.info("session with %s closed: %s", self.peer or "unknown peer", reason)

    # hand-offs

    def offer(self, handle: Handle, offer: Offer, now: float) -> SendHandoff:
        self._now, self._heard = now, self._heard if self.has_handoffs else now  # idle: both may be older than a lease
        sender = SendHandoff(handle, offer, self, self._settings.lease_s, now)
        self.senders[handle] = sender
        sender.start()
        return sender

    def _all_handoffs(self) -> list[SendHandoff | ReceiveHandoff]:
        return [*self.senders.values(), *self.receivers.values()]

    # numbers, for any thread

    def quarantined_blocks(self) -> int:
        """Blocks of ended hand-offs that operations may still touch."""
        reading = sum(s.num_blocks_held for s in list(self.senders.values()) if not s.live)
        return reading + sum(len(r.landing.block_ids) for r in list(self.receivers.values()) if not r.live)

    def traffic(self) -> Traffic:
        bytes_received = self._num_blocks_received * self._handoffs.block_bytes
        return Traffic(self._meter.bytes_sent, bytes_received, self._num_messages)

    def peer_stats(self) -> PeerStats | None:
        """None while the peer is not authenticated."""
        peer, meter = self.peer, self._meter
        if peer is None:
            return None
        transports = self.channel.describe()
        return PeerStats(peer.engine_id, peer.generation, transports, meter.bandwidth_bytes_s, meter.latency_s)

    # HandoffLink

    @property
    def sums(self) -> BlockSums | None:
        return self._handoffs.sums

    def send(self, message: Message) -> None:
        if self.state is SessionState.CONNECTING:
            self._backlog.append(message)
        elif self.state is SessionState.OPEN and self.peer is not None:
            self._num_messages += 1
            self.channel.send(self._frames.pack(message, self.peer))

    def emit(self, event: Event) -> None:
        self._handoffs.emit(event)

    def queue_block(self, source: BlockSource, index: int) -> None:
        self._window.queue_block(source, index)

    def first_tag(self, handle: Handle, count: int) -> int:
        first = self._next_tag
        self._next_tag += count
        self._landing[handle] = self.receivers[handle]
        return first

    def post_receive(self, tag: int, block_id: int) -> Operation:
        return self.channel.post_receive(tag, block_id)

    def failure(self, operation: Operation) -> str | None:
        return self.channel.failure(operation)

    def received(self, count: int) -> None:
        self._num_blocks_received += count

    def alive(self) -> bool:
        return self.channel.probe() is None

    def drains(self) -> None:
        self._send_renew(())

    def forget(self, handle: Handle) -> None:
        sender = self.senders.pop(handle, None)
        if sender is not None and not sender.granted:
            self._late_grants.expect(handle, sender.offer.num_blocks)
        self.receivers.pop(handle, None)
        self._handoffs.forget(handle)

    # incoming

    def _take(self, data: bytes | bytearray) -> None:
        if self.state is SessionState.CONNECTING:
            self._take_step(self._handshake.receive(data))
            return
        message = self._frames.unpack(data, self.peer)
        self._heard = self._now
        self._num_messages += 1
        self._dispatch(message)

    def _take_step(self, step: HandshakeStep) -> None:
        if step.send is not None:
            self.channel.send(step.send)
        if step.peer is not None:
            self.channel.establish(step.peer.blob)
            self.peer = step.peer.address
            self.state = SessionState.OPEN
            self._heard = self._now
            log.info("session with %s open over %s", self.peer, self.channel.describe())
            self._on_open(self, step.peer.address)
            backlog, self._backlog = self._backlog, []
            for message in backlog:
                self.send(message)
            self._send_renew(())

    def _refuse(self, reason: str) -> None:
        log.warning("session with %s refused: %s", self.peer or "unknown peer", reason)
        if self.state is SessionState.CONNECTING:
            self.channel.send(refusal(reason))
        self.close(reason)

    def _dispatch(self, message: Message) -> None:
        if isinstance(message, RenewMessage):
            self._on_renew(message)
            return
        sender, receiver = self.senders.get(message.handle), self.receivers.get(message.handle)
        try:
            if isinstance(message, OfferMessage):
                self._on_offer(message)
            elif isinstance(message, CancelMessage | FailMessage):
                cause = message.cause if isinstance(message, CancelMessage) else Cause.FAILED
                if sender is not None:
                    sender.on_peer_end(message.reason, self._now, cause)
                if receiver is not None:
                    receiver.on_peer_end(message.reason, self._now, cause)
            elif isinstance(message, GrantMessage | AckMessage):
                self._to_sender(sender, message)
            else:
                self._to_receiver(receiver, message)
        except HandoffStateError as illegal:
            if sender is not None:
                sender.fail(f"protocol error: {illegal}", self._now)
            if receiver is not None:
                receiver.fail(f"protocol error: {illegal}", self._now)

    def _on_offer(self, message: OfferMessage) -> None:
        if message.handle in self.receivers:
            raise HandoffStateError("offered twice")
        offer = Offer(key_of(message.handle), message.num_tokens, message.num_blocks)
        receiver = ReceiveHandoff(message.handle, offer, self)
        reason = self._over_a_limit(offer)
        if reason is None and not self._handoffs.add_receiver(receiver):
            reason = "a hand-off of this request and epoch is open already"
        if reason is not None or self.peer is None:
            self.send(FailMessage(message.handle, f"offer refused: {reason}"))
            return
        self.receivers[message.handle] = receiver
        self.emit(Offered(offer, self.peer))

    def _over_a_limit(self, offer: Offer) -> str | None:
        settings = self._settings
        if len(self.receivers) >= settings.max_handoffs_per_session:
            return f"more than {settings.max_handoffs_per_session} open hand-offs"
        if offer.num_blocks > settings.max_blocks_per_handoff:
            return f"{offer.num_blocks} blocks are more than {settings.max_blocks_per_handoff}"
        return None

    def _to_sender(self, sender: SendHandoff | None, message: GrantMessage | AckMessage) -> None:
        if isinstance(message, AckMessage):
            if sender is not None and sender.live:
                sender.on_ack(self._now)
        elif sender is not None and sender.live:
            sender.on_grant(message, self._now)
        elif sender is None and message.count <= self._late_grants.take(message.handle):
            self._window.queue_aborts(message.first_tag, message.count)  # completes the receives that it speaks of
        elif sender is None:
            self.send(FailMessage(message.handle, "refused: no such hand-off here"))

    def _to_receiver(self, receiver: ReceiveHandoff | None, message: BlocksMessage | SumsMessage | DoneMessage) -> None:
        if receiver is None:
            self.send(FailMessage(message.handle, "refused: no such hand-off here"))
        elif receiver.live and isinstance(message, BlocksMessage):
            receiver.on_blocks(message, self._now)
        elif receiver.live and isinstance(message, SumsMessage):
            receiver.on_sums(message, self._now)
        elif receiver.live and isinstance(message, DoneMessage):
            receiver.on_done(message, self._now)

    # leases

    def _on_renew(self, message: RenewMessage) -> None:
        if message.is_reply:
            self._meter.on_round_trip(self._now - message.stamp_us / 1e6)
            return
        for handle in message.handles:
            if handle in self.senders:
                self.senders[handle].renew(self._now)
            elif handle not in self.receivers:
                self.send(FailMessage(handle, "refused: no such hand-off here"))
        self.send(RenewMessage(message.stamp_us, True, ()))

    def _renew(self) -> None:
        self._renew_at = self._now + self._settings.renew_s
        live = [h.handle for h in self._all_handoffs() if h.live]
        for start in range(0, len(live), MAX_RENEW_HANDLES):
            self._send_renew(live[start : start + MAX_RENEW_HANDLES])

    def _send_renew(self, handles: Iterable[Handle]) -> None:
        self.send(RenewMessage(max(0, int(self._now * 1e6)), False, tuple(handles)))

    def _warn_if_slow(self) -> None:
        floor = self._settings.bandwidth_floor_bytes_s
        if self._meter.becomes_slow(floor):
            measured, over = self._meter.bandwidth_bytes_s, self.channel.describe()
            log.warning("slow link to %s: %.3g B/s over %s, floor %.3g", self.peer, measured, over, floor)

    # blocks

    def _move_blocks(self) -> bool:
        moved = self._window.advance(self._now)
        for handle, receiver in list(self._landing.items()):
            moved |= receiver.poll(self._now)
            if not receiver.receiving:
                self._landing.pop(handle, None)
        return moved
