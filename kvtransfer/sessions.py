"""The sessions of an agent by peer, and the newest generation known of each engine."""

from __future__ import annotations

from kvbaton.kvtransfer.handshake import HandshakeRefused
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.session import Session
from kvbaton.kvtransfer.transport import Channel


class Roster:
    """One outbound and one inbound session per engine; an inbound one has no name until its handshake is done."""

    def __init__(self) -> None:
        self._by_channel: dict[Channel, Session] = {}
        self._outbound: dict[str, Session] = {}
        self._inbound: dict[str, Session] = {}
        self._expected: dict[Session, PeerAddress] = {}
        self._newest: dict[str, int] = {}

    def snapshot(self) -> tuple[Session, ...]:
        return tuple(self._by_channel.values())

    def of_channel(self, channel: Channel) -> Session | None:
        return self._by_channel.get(channel)

    def outbound(self, peer: PeerAddress) -> Session | None:
        """The session to this very incarnation."""
        session = self._outbound.get(peer.engine_id)
        if session is None or self._expected[session].generation != peer.generation:
            return None
        return session

    def add_outbound(self, session: Session, peer: PeerAddress) -> None:
        self._by_channel[session.channel] = session
        self._outbound[peer.engine_id] = session
        self._expected[session] = peer

    def add_inbound(self, session: Session) -> None:
        self._by_channel[session.channel] = session

    def num_strangers(self) -> int:
        """Inbound sessions in their handshake."""
        return sum(s.peer is None and s not in self._expected for s in self._by_channel.values())

    def check_current(self, peer: PeerAddress) -> None:
        """Raises HandshakeRefused for an incarnation that a newer one has replaced."""
        newest = self._newest.get(peer.engine_id, peer.generation)
        if peer.generation < newest:
            raise HandshakeRefused(
                f"generation {peer.generation} of {peer.engine_id} is over: generation {newest} is known"
            )

    def learn(self, peer: PeerAddress) -> list[Session]:
        """Note the incarnation; returns the sessions of older ones."""
        newest = max(peer.generation, self._newest.get(peer.engine_id, 0))
        self._newest[peer.engine_id] = newest
        return [s for s in self._of_engine(peer.engine_id) if self._generation(s) < newest]

    def opened(self, session: Session, peer: PeerAddress) -> list[Session]:
        """An inbound session now has a name; returns an earlier one of the same peer."""
        if session in self._expected:
            return []
        older = self._inbound.get(peer.engine_id)
        self._inbound[peer.engine_id] = session
        return [] if older is None else [older]

    def remove(self, session: Session) -> bool:
        """False if it was removed before."""
        if self._by_channel.pop(session.channel, None) is None:
            return False
        self._expected.pop(session, None)
        for table in (self._outbound, self._inbound):
            for name in [n for n, s in table.items() if s is session]:
                del table[name]
        return True

    def _of_engine(self, engine_id: str) -> list[Session]:
        tables = (self._outbound, self._inbound)
        return [table[engine_id] for table in tables if engine_id in table]

    def _generation(self, session: Session) -> int:
        if session in self._expected:
            return self._expected[session].generation
        return session.peer.generation if session.peer is not None else 0
