"""The sessions of one agent: opened and accepted, found by peer, replaced by a newer incarnation's, ended.

One outbound and one inbound session per engine; an inbound one has no name until its handshake is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.kvtransfer.handshake import Handshake, HandshakeRefused, Hello, check_compatible
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.open_handoffs import OpenHandoffs
from kvbaton.kvtransfer.session import Session
from kvbaton.kvtransfer.stats import Traffic
from kvbaton.kvtransfer.transport import Channel, Transport, TransportError

log = logging.getLogger(__name__)


class Sessions:
    """Used on the agent's thread alone, but for `snapshot` and `traffic`.

    `compatibility` lists (field, value) pairs that must be equal at both engines, beside the kind of checksum;
    `secret` is the cluster's.
    """

    def __init__(
        self,
        transport: Transport,
        address: PeerAddress,
        secret: bytes,
        compatibility: tuple[tuple[str, str], ...],
        settings: TransferConfig,
        handoffs: OpenHandoffs,
    ) -> None:
        self._transport = transport
        self._address = address
        self._secret = secret
        self._compatibility = (*compatibility, ("kvtransfer.checksum", settings.checksum))
        self._settings = settings
        self._handoffs = handoffs
        self._by_channel: dict[Channel, Session] = {}
        self._outbound: dict[str, Session] = {}
        self._inbound: dict[str, Session] = {}
        self._expected: dict[Session, PeerAddress] = {}  # whom an outbound session is meant for
        self._newest: dict[str, int] = {}  # generation, by engine
        self._ended = Traffic()

    def snapshot(self) -> tuple[Session, ...]:
        """Those that are open or in their handshake. Thread-safe."""
        return tuple(self._by_channel.values())

    def traffic(self) -> Traffic:
        """Of all sessions since the start. Thread-safe."""
        return sum((session.traffic() for session in self.snapshot()), self._ended)

    def num_strangers(self) -> int:
        """Inbound sessions in their handshake."""
        return sum(s.peer is None and s not in self._expected for s in self._by_channel.values())

    def poll(self, now: float) -> bool:
        """Move data on every session and take new connections; True if anything happened."""
        worked = False
        for channel in self._transport.progress():
            session = self._by_channel.get(channel)
            if session is not None:
                worked |= session.poll(now)
                self._remove_if_closed(session)
        while (arrived := self._transport.accept()) is not None:
            self._accept(arrived, now)
            worked = True
        return worked

    def tick(self, now: float) -> None:
        """Fire every session's timers."""
        for session in self.snapshot():
            session.tick(now)
            self._remove_if_closed(session)

    def to(self, peer: PeerAddress, now: float) -> Session:
        """The session on which offers to this very incarnation go, opened if there is none.

        Raises TransportError where it cannot be reached, HandshakeRefused where a newer one has replaced it.
        """
        self._check_current(peer)
        session = self._outbound.get(peer.engine_id)
        if session is not None and self._expected[session].generation == peer.generation:
            return session
        self._end_older(peer)
        channel = self._transport.connect(peer.host, peer.port)
        session = self._make(channel, partial(self._admit_expected, peer), now, initiator=True)
        try:
            session.start()
        except TransportError:
            channel.close()
            raise
        self._by_channel[channel] = session
        self._outbound[peer.engine_id] = session
        self._expected[session] = peer
        return session

    def end_all(self, reason: str) -> None:
        """What they held is failed and released."""
        for session in self.snapshot():
            self._end(session, reason)

    def _accept(self, channel: Channel, now: float) -> None:
        if self.num_strangers() >= self._settings.max_strangers:
            log.warning("connection refused: %d peers have not said who they are", self._settings.max_strangers)
            channel.close()
            return
        self._by_channel[channel] = self._make(channel, self._admit, now, initiator=False)

    def _make(self, channel: Channel, admit: Callable[[Hello], None], now: float, initiator: bool) -> Session:
        handshake = Handshake(self._secret, initiator, partial(self._hello, channel), admit)
        generation = self._address.generation
        return Session(channel, handshake, generation, self._settings, self._handoffs, self._opened, now)

    def _hello(self, channel: Channel) -> Hello:
        return Hello(self._address, self._compatibility, channel.local_blob())

    def _admit(self, hello: Hello) -> None:
        check_compatible(self._compatibility, hello.compatibility)
        self._check_current(hello.address)

    def _admit_expected(self, expected: PeerAddress, hello: Hello) -> None:
        check_compatible(self._compatibility, hello.compatibility)
        met = hello.address
        if (met.engine_id, met.generation) != (expected.engine_id, expected.generation):
            raise HandshakeRefused(
                f"expected {expected.engine_id} generation {expected.generation}, "
                f"met {met.engine_id} generation {met.generation}"
            )

    def _check_current(self, peer: PeerAddress) -> None:
        """Raises HandshakeRefused for an incarnation that a newer one has replaced."""
        newest = self._newest.get(peer.engine_id, peer.generation)
        if peer.generation < newest:
            raise HandshakeRefused(
                f"generation {peer.generation} of {peer.engine_id} is over: generation {newest} is known"
            )

    def _opened(self, session: Session, peer: PeerAddress) -> None:
        """The peer is authenticated: what earlier incarnations or connections of it held is over."""
        self._end_older(peer)
        if session in self._expected:
            return
        older = self._inbound.get(peer.engine_id)
        self._inbound[peer.engine_id] = session
        if older is not None:
            self._end(older, f"{peer.engine_id} has connected anew")

    def _end_older(self, peer: PeerAddress) -> None:
        """Note the incarnation and end the sessions of those before it."""
        newest = max(peer.generation, self._newest.get(peer.engine_id, 0))
        self._newest[peer.engine_id] = newest
        for session in list(self._of_engine(peer.engine_id)):
            if self._generation_of(session) < newest:
                self._end(session, f"{peer.engine_id} was replaced by generation {peer.generation}")

    def _of_engine(self, engine_id: str) -> Iterator[Session]:
        for table in (self._outbound, self._inbound):
            if engine_id in table:
                yield table[engine_id]

    def _generation_of(self, session: Session) -> int:
        if session in self._expected:
            return self._expected[session].generation
        return session.peer.generation if session.peer is not None else 0

    def _end(self, session: Session, reason: str) -> None:
        session.close(reason)
        self._remove_if_closed(session)

    def _remove_if_closed(self, session: Session) -> None:
        if not session.closed or self._by_channel.pop(session.channel, None) is None:
            return
        self._expected.pop(session, None)
        for table in (self._outbound, self._inbound):
            for name in [n for n, s in table.items() if s is session]:
                del table[name]
        self._ended += session.traffic()
