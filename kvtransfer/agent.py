"""The transfer agent of one engine: every hand-off that it gives or takes, over any number of peers.

The engine's thread calls the commands; they return at once and are carried out by `poll`, on the agent's own thread or,
in tests, by hand. Events come back through `on_event`, on the thread that polls.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvbaton.kvtransfer.checksum import block_sums
from kvbaton.kvtransfer.config import Identity, TransferConfig
from kvbaton.kvtransfer.handshake import HandshakeRefused
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
from kvbaton.kvtransfer.open_handoffs import OpenHandoffs
from kvbaton.kvtransfer.sessions import Sessions
from kvbaton.kvtransfer.stats import TransferStats
from kvbaton.kvtransfer.transport import BlockMemory, Transport, TransportError
from kvbaton.kvtransfer.wire import Handle

log = logging.getLogger(__name__)

_IDLE_WAIT_S = 3600.0
_SPINS_WHILE_MOVING = 200  # empty polls before sleeping while blocks are moving


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
        settings: TransferConfig,
        on_event: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._address = PeerAddress(identity.engine_id, identity.generation, transport.host, transport.port)
        self._num_blocks = memory.num_blocks
        self._transport = transport
        self._settings = settings
        self._clock = clock
        self._commands: deque[Callable[[], None]] = deque()
        self._serials = itertools.count(1)
        self._handoffs = OpenHandoffs(memory, block_sums(settings.checksum, memory), on_event)
        self._sessions = Sessions(transport, self._address, secret, compatibility, settings, self._handoffs)
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
        return self._handoffs.counts

    def stats(self) -> TransferStats:
        """Thread-safe; a moment's inconsistency between counters is possible while the agent runs."""
        sessions, counts = self._sessions.snapshot(), self._handoffs.counts
        traffic = self._sessions.traffic()
        return TransferStats(
            bytes_sent=traffic.bytes_sent,
            bytes_received=traffic.bytes_received,
            messages=traffic.messages,
            handoffs_failed=counts.failed,
            handoffs_acked=counts.acked,
            checksum_failures=counts.checksum_failures,
            sending=len(self._handoffs.senders),
            receiving=len(self._handoffs.receivers),
            quarantined_blocks=sum(s.quarantined_blocks() for s in sessions),
            peers=tuple(p for s in sessions if (p := s.peer_stats()) is not None),
        )

    def start(self) -> None:
        """Run on a thread of its own until `close`. Raises TransportError if the transport cannot open."""
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
        worked |= self._sessions.poll(self._now)
        if self._now >= self._tick_at:
            self._tick_at = self._now + self._settings.lease_s / 40
            self._sessions.tick(self._now)
        return worked

    def wait_s(self) -> float:
        """How long nothing need happen here unless a peer or a command wants something."""
        if self._commands:
            return 0.0
        waiting = any(s.peer is None or s.has_handoffs for s in self._sessions.snapshot())
        return max(0.0, self._tick_at - self._clock()) if waiting else _IDLE_WAIT_S

    @property
    def busy(self) -> bool:
        """Blocks are moving on some session."""
        return any(s.busy for s in self._sessions.snapshot())

    def abandon(self, reason: str) -> None:
        """Close every session; what they held is failed and released."""
        self._sessions.end_all(reason)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._transport.wake()

    # prefill's commands

    def _offer(self, offer: Offer, peer: PeerAddress) -> None:
        if offer.key in self._handoffs.senders:
            log.error("offer of %s ignored: it is being handed off already", offer.key)
            return
        try:
            session = self._sessions.to(peer, self._now)
        except (TransportError, HandshakeRefused) as error:
            self._refuse_offer(offer.key, f"cannot reach {peer.engine_id}: {error}")
            return
        if len(session.senders) >= self._settings.max_handoffs_per_session:
            self._refuse_offer(
                offer.key, f"more than {self._settings.max_handoffs_per_session} hand-offs to {peer.engine_id}"
            )
            return
        handle = Handle(offer.key.request_id, offer.key.epoch, next(self._serials))
        self._handoffs.senders[offer.key] = session.offer(handle, offer, self._now)

    def _refuse_offer(self, key: HandoffKey, reason: str) -> None:
        self._handoffs.emit(Failed(key, reason))
        self._handoffs.emit(Released(key, acked=False))

    def _blocks_ready(self, key: HandoffKey, block_ids: tuple[int, ...]) -> None:
        if (sender := self._handoffs.senders.get(key)) is None:
            return
        if any(not 0 <= b < self._num_blocks for b in block_ids):
            sender.fail(f"block ids outside the pool of {self._num_blocks}: {block_ids!r:.80}", self._now)
            return
        sender.blocks_ready(block_ids, self._now)

    def _finish(self, key: HandoffKey, payload: bytes) -> None:
        if (sender := self._handoffs.senders.get(key)) is None:
            return
        if len(payload) > self._settings.max_payload_bytes:
            sender.fail(f"payload of {len(payload)} bytes is over {self._settings.max_payload_bytes}", self._now)
            return
        sender.finish(payload, self._now)

    # decode's commands

    def _grant(self, key: HandoffKey, landing: Landing) -> None:
        receiver = self._handoffs.receivers.get(key)
        if receiver is None or not receiver.live:
            return
        num_blocks = receiver.offer.num_blocks
        if landing.first_block < 0 or landing.first_block + len(landing.block_ids) != num_blocks:
            receiver.fail(
                f"landing of {landing.first_block}+{len(landing.block_ids)} blocks for {num_blocks}", self._now
            )
        elif (reason := self._handoffs.landing.claim(key, landing.block_ids)) is not None:
            receiver.fail(f"landing refused: {reason}", self._now)
        else:
            receiver.grant(landing)

    def _ack(self, key: HandoffKey) -> None:
        if (receiver := self._handoffs.receivers.get(key)) is not None:
            receiver.ack(self._now)

    def _cancel(self, key: HandoffKey, reason: str, cause: GivenUp) -> None:
        if (sender := self._handoffs.senders.get(key)) is not None:
            sender.cancel(reason, self._now, cause)
        if (receiver := self._handoffs.receivers.get(key)) is not None:
            receiver.cancel(reason, self._now, cause)


class AgentThread:
    """Polls the agent while there is work, sleeps in the transport's wait when there is none."""

    def __init__(self, agent: TransferAgent, transport: Transport) -> None:
        self._agent = agent
        self._transport = transport
        self._stopping = False
        self._opened = threading.Event()
        self._open_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="kvtransfer", daemon=True)

    def start(self) -> None:
        """Returns once the transport is open, or raises what it raised."""
        self._thread.start()
        self._opened.wait()
        if self._open_error is not None:
            raise self._open_error

    def stop(self) -> None:
        """Idempotent; returns when the thread has ended."""
        self._stopping = True
        if self._thread.is_alive():
            self._transport.wake()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._transport.open()
        except Exception as error:
            self._open_error = error
            return
        finally:
            self._opened.set()
        while not self._stopping:
            try:
                self._loop()
            except Exception as error:
                log.exception("a bug in the transfer agent: every session is closed")
                self._agent.abandon(f"internal error in the transfer agent: {error}")

    def _loop(self) -> None:
        spins = 0
        while not self._stopping:
            if self._agent.poll():
                spins = 0
                continue
            spins += 1
            if spins > _SPINS_WHILE_MOVING or not self._agent.busy:
                self._transport.wait(self._agent.wait_s())
                spins = 0
