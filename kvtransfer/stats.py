"""A transfer agent's numbers at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbaton.kvtransfer.session import Session


@dataclass(frozen=True, slots=True)
class PeerStats:
    """One open session. Bandwidth and latency are None until there was traffic to measure them."""

    engine_id: str
    generation: int
    transports: str
    bandwidth_bytes_s: float | None
    latency_s: float | None


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Counters since start, gauges at present. `sending` and `receiving` count open hand-offs, drains included.

    The hand-offs' ends are those of `HandoffCounts`.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0
    handoffs_failed: int = 0
    handoffs_acked: int = 0
    checksum_failures: int = 0
    sending: int = 0
    receiving: int = 0
    quarantined_blocks: int = 0
    peers: tuple[PeerStats, ...] = ()


def peer_stats(session: Session) -> PeerStats | None:
    """None while the peer is not authenticated."""
    peer, meter = session.peer, session.meter
    if peer is None:
        return None
    transports = session.channel.describe()
    return PeerStats(peer.engine_id, peer.generation, transports, meter.bandwidth_bytes_s, meter.latency_s)
