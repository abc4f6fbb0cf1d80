"""The transfer agent of one engine: every hand-off that it gives or takes, over any number of peers.

The engine's thread calls the commands; they return at once and are carried out by `poll`, on the agent's own thread
(see thread.py) or, in tests, by hand. Events come back through `on_event`, on the thread that polls.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvbaton.kvtransfer.block_memory import BlockMemory
from kvbaton.kvtransfer.checksum import block_sums
from kvbaton.kvtransfer.counters import TransferCounters
from kvbaton.kvtransfer.handshake import Handshake, HandshakeRefused, Hello, check_compatible
from kvbaton.kvtransfer.landing import LandingBlocks
from kvbaton.kvtransfer.link import key_of
from kvbaton.kvtransfer.messages import (
    Cause,
    Event,
    Failed,
    GivenUp,
    HandoffCounts,
    HandoffKey,
    Landing,
    Offer,
    PeerAddress,
    Released,
)
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.roster import Roster
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.session import Session
from kvbaton.kvtransfer.session_owner import SessionOwner
from kvbaton.kvtransfer.settings import Identity, TransferSettings
from kvbaton.kvtransfer.stats import TransferStats
from kvbaton.kvtransfer.thread import AgentThread
from kvbaton.kvtransfer.transport import Channel, Transport, TransportError
from kvbaton.kvtransfer.wire import Handle

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 3600.0


class TransferAgent:
    """`compatibility` lists (field, value) pairs that must be equal at both engines; `secret` is the cluster's.

    Raises `ConfigError` where the memory cannot have the checksum that `settings` ask for.
    """

    def __init__(
        self,
        memory: BlockMemory,
        identity: Identity,
        transport: Transport,
        secret: bytes,
        compatibility: tuple[tuple[str, str], ...],
        settings: TransferSettings,
        on_event: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._address = PeerAddress(identity.engine_id, identity.generation, transport.host, transport.port)
        self._memory = memory
        self._transport = transport
        self._secret = secret
        self._compatibility = (*compatibility, ("kvtransfer.checksum", settings.checksum))
        self._sums = block_sums(settings.checksum, memory)
        self._settings = settings
        self._on_event = on_event
        self._clock = clock
        self._commands: deque[Callable[[], None]] = deque()
        self._serials = itertools.count(1)
        self._senders: dict[HandoffKey, SendHandoff] = {}
        self._receivers: dict[HandoffKey, tuple[Session, ReceiveHandoff]] = {}
        self._landing = LandingBlocks(memory.num_blocks)
        self._roster = Roster()
        self._counters = TransferCounters(memory.block_bytes)
        self._now = clock()
        self._tick_at = self._now
        self._thread = AgentThread(self, transport)

    # commands: any thread, at once

    def offer(self, offer: Offer, peer: PeerAddress) -> None:
        """Prefill: ask `peer` for landing blocks."""
        self._command(partial(self._offer, offer, peer))

    def blocks_ready(self, key: HandoffKey, block_ids: Sequence[int]) -> None:
        """Prefill: the next blocks of the prompt, in order. The agent may read them until Released."""
        self._command(partial(self._blocks_ready, key, tuple(block_ids)))

    def finish(self, key: HandoffKey, payload: bytes) -> None:
        """Prefill: every block was made ready. `payload` reaches decode with Landed."""
        self._command(partial(self._finish, key, payload))

    def grant(self, key: HandoffKey, landing: Landing) -> None:
        """Decode: take the hand-off. The agent owns the landing blocks until Landed or Released."""
        self._command(partial(self._grant, key, landing))

    def ack(self, key: HandoffKey) -> None:
        """Decode, after Landed: prefill may drop its hold. The hand-off is over here."""
        self._command(partial(self._ack, key))

    def cancel(self, key: HandoffKey, reason: str, cause: GivenUp = Cause.CANCELLED) -> None:
        """Either side, any time; Released follows unless the key is unknown here. The peer's Failed has the cause."""
        self._command(partial(self._cancel, key, reason, cause))

    def address(self) -> PeerAddress:
        """Where peers reach this agent."""
        return self._address

    def counts(self) -> HandoffCounts:
        """Thread-safe."""
        return self._counters.handoffs

    def stats(self) -> TransferStats:
        """Thread-safe; a moment's inconsistency between counters is possible while the agent runs."""
        return self._counters.stats(self._roster.snapshot(), len(self._senders), len(self._receivers))

    def start(self) -> None:
        """Run on an own thread until `close`. Raises TransportError if the transport cannot open."""
        self._thread.start()

    def close(self) -> None:
        """Close every session (what they hold is failed and released) and stop the thread."""
        self._thread.stop()
        self._now = self._clock()
        self.abandon("the engine's transfer agent is closing")
        self._transport.close()

    # the polling thread

    def poll(self) -> bool:
        """Carry out commands, take what arrived, fire timers; True if anything happened."""
        self._now = self._clock()
        worked = bool(self._commands)
        while self._commands:
            self._commands.popleft()()
        for channel in self._transport.progress():
            worked |= self._poll_session(channel)
        while (arrived := self._transport.accept()) is not None:
            self._accept(arrived)
            worked = True
        if self._now >= self._tick_at:
            self._tick()
        return worked

    def wait_s(self) -> float:
        """How long nothing need happen here unless a peer or a command wants something."""
        if self._commands:
            return 0.0
        waiting = any(s.peer is None or s.has_handoffs for s in self._roster.snapshot())
        return max(0.0, self._tick_at - self._clock()) if waiting else _IDLE_WAIT_S

    @property
    def busy(self) -> bool:
        """Blocks are moving on some session."""
        return any(s.busy for s in self._roster.snapshot())

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._transport.wake()

    def _poll_session(self, channel: Channel) -> bool:
        session = self._roster.of_channel(channel)
        if session is None:
            return False
        worked = session.poll(self._now)
        if session.closed:
            self._retire(session)
        return worked

    def _tick(self) -> None:
        self._tick_at = self._now + self._settings.lease_s / 40
        for session in self._roster.snapshot():
            session.tick(self._now)
            if session.closed:
                self._retire(session)

    # prefill's commands

    def _offer(self, offer: Offer, peer: PeerAddress) -> None:
        if offer.key in self._senders:
            log.error("offer of %s ignored: it is being handed off already", offer.key)
            return
        try:
            session = self._session_to(peer)
        except (TransportError, HandshakeRefused) as error:
            self._refuse_offer(offer.key, f"cannot reach {peer.engine_id}: {error}")
            return
        if len(session.senders) >= self._settings.max_handoffs_per_session:
            self._refuse_offer(
                offer.key, f"more than {self._settings.max_handoffs_per_session} hand-offs to {peer.engine_id}"
            )
            return
        handle = Handle(offer.key.request_id, offer.key.epoch, next(self._serials))
        self._senders[offer.key] = session.offer(handle, offer, self._now)

    def _refuse_offer(self, key: HandoffKey, reason: str) -> None:
        self._emit(Failed(key, reason))
        self._emit(Released(key, acked=False))

    def _blocks_ready(self, key: HandoffKey, block_ids: tuple[int, ...]) -> None:
        if (sender := self._senders.get(key)) is None:
            return
        if any(not 0 <= b < self._memory.num_blocks for b in block_ids):
            sender.fail(f"block ids outside the pool of {self._memory.num_blocks}: {block_ids!r:.80}", self._now)
            return
        sender.blocks_ready(block_ids, self._now)

    def _finish(self, key: HandoffKey, payload: bytes) -> None:
        if (sender := self._senders.get(key)) is None:
            return
        if len(payload) > self._settings.max_payload_bytes:
            sender.fail(f"payload of {len(payload)} bytes is over {self._settings.max_payload_bytes}", self._now)
            return
        sender.finish(payload, self._now)

    # decode's commands

    def _grant(self, key: HandoffKey, landing: Landing) -> None:
        if key not in self._receivers:
            return
        session, receiver = self._receivers[key]
        if not receiver.live:
            return
        num_blocks = receiver.offer.num_blocks
        if landing.first_block < 0 or landing.first_block + len(landing.block_ids) != num_blocks:
            receiver.fail(
                f"landing of {landing.first_block}+{len(landing.block_ids)} blocks for {num_blocks}", self._now
            )
        elif reason := self._landing.claim(key, landing.block_ids):
            receiver.fail(f"landing refused: {reason}", self._now)
        else:
            session.grant(receiver, landing)

    def _ack(self, key: HandoffKey) -> None:
        if key in self._receivers:
            self._receivers[key][1].ack(self._now)

    def _cancel(self, key: HandoffKey, reason: str, cause: GivenUp) -> None:
        if (sender := self._senders.get(key)) is not None:
            sender.cancel(reason, self._now, cause)
        if key in self._receivers:
            self._receivers[key][1].cancel(reason, self._now, cause)

    # sessions

    def _session_to(self, peer: PeerAddress) -> Session:
        """The session on which offers to `peer` go, opened if there is none."""
        self._roster.check_current(peer)
        session = self._roster.outbound(peer)
        if session is not None:
            return session
        self._replace_older(peer)
        channel = self._transport.connect(peer.host, peer.port)
        session = self._make_session(channel, partial(self._admit_expected, peer), initiator=True)
        try:
            session.start()
        except TransportError:
            channel.close()
            raise
        self._roster.add_outbound(session, peer)
        return session

    def _accept(self, channel: Channel) -> None:
        if self._roster.num_strangers() >= self._settings.max_strangers:
            log.warning("connection refused: %d peers have not said who they are", self._settings.max_strangers)
            channel.close()
            return
        self._roster.add_inbound(self._make_session(channel, self._admit, initiator=False))

    def _make_session(self, channel: Channel, admit: Callable[[Hello], None], initiator: bool) -> Session:
        owner = SessionOwner(
            generation=self._address.generation,
            block_bytes=self._memory.block_bytes,
            settings=self._settings,
            sums=self._sums,
            emit=self._emit,
            opened=self._opened,
            offered=self._offered,
            forgotten=self._forgotten,
        )
        handshake = Handshake(self._secret, initiator, partial(self._hello, channel), admit)
        return Session(channel, handshake, owner, self._now)

    def _hello(self, channel: Channel) -> Hello:
        return Hello(self._address, self._compatibility, channel.local_blob())

    def _admit(self, hello: Hello) -> None:
        check_compatible(self._compatibility, hello.compatibility)
        self._roster.check_current(hello.address)

    def _admit_expected(self, expected: PeerAddress, hello: Hello) -> None:
        check_compatible(self._compatibility, hello.compatibility)
        met = hello.address
        if (met.engine_id, met.generation) != (expected.engine_id, expected.generation):
            raise HandshakeRefused(
                f"expected {expected.engine_id} generation {expected.generation}, "
                f"met {met.engine_id} generation {met.generation}"
            )

    def _opened(self, session: Session, hello: Hello) -> None:
        """An authenticated peer: what earlier incarnations or connections of it held is over."""
        self._replace_older(hello.address)
        for older in self._roster.opened(session, hello.address):
            self._end_session(older, f"{hello.address.engine_id} has connected anew")

    def _replace_older(self, peer: PeerAddress) -> None:
        for older in self._roster.learn(peer):
            self._end_session(older, f"{peer.engine_id} was replaced by generation {peer.generation}")

    def _end_session(self, session: Session, reason: str) -> None:
        session.close(reason)
        self._retire(session)

    def _retire(self, session: Session) -> None:
        if self._roster.remove(session):
            self._counters.retire(session)

    # what sessions report

    def _offered(self, session: Session, receiver: ReceiveHandoff) -> bool:
        key = key_of(receiver.handle)
        if key in self._receivers:
            return False
        self._receivers[key] = (session, receiver)
        return True

    def _forgotten(self, handle: Handle) -> None:
        key = key_of(handle)
        if key in self._senders and self._senders[key].handle == handle:
            del self._senders[key]
        if key in self._receivers and self._receivers[key][1].handle == handle:
            del self._receivers[key]
            self._landing.release(key)

    def _emit(self, event: Event) -> None:
        self._counters.on_event(event)
        self._on_event(event)

    def abandon(self, reason: str) -> None:
        """Close every session; what they held is failed and released."""
        for session in self._roster.snapshot():
            self._end_session(session, reason)
