"""What is counted and measured: on one connection, and by an agent over all of them."""

from __future__ import annotations

from dataclasses import dataclass

MIN_SAMPLE_BYTES = 4 << 20
_WEIGHT = 0.25  # of the newest sample


@dataclass(frozen=True, slots=True)
class Traffic:
    """Blocks' bytes, and control messages in both directions."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.messages + other.messages,
        )


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


class LinkMeter:
    """Bandwidth and latency of one pair of engines, from the traffic itself; only RENEW's stamp is sent to measure.

    Bandwidth is bytes over the time in which at least one send was running; latency is half the best recent round trip.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bandwidth_bytes_s: float | None = None
        self.latency_s: float | None = None
        self._busy_since: float | None = None
        self._sample_bytes = 0
        self._slow = False

    def becomes_slow(self, floor_bytes_s: float) -> bool:
        """True when the bandwidth has fallen below the floor since this was asked last."""
        slow = self.bandwidth_bytes_s is not None and self.bandwidth_bytes_s < floor_bytes_s
        slow, self._slow = slow and not self._slow, slow
        return slow

    def on_round_trip(self, seconds: float) -> None:
        half = max(0.0, seconds) / 2
        self.latency_s = half if self.latency_s is None else min(half, 0.9 * self.latency_s + 0.1 * half)

    def on_posted(self, now: float) -> None:
        if self._busy_since is None:
            self._busy_since = now

    def on_sent(self, num_bytes: int, now: float, idle: bool) -> None:
        """Some sends have completed; `idle` when none is left running."""
        self.bytes_sent += num_bytes
        self._sample_bytes += num_bytes
        if self._busy_since is not None and self._sample_bytes >= MIN_SAMPLE_BYTES and now > self._busy_since:
            sample = self._sample_bytes / (now - self._busy_since)
            old = self.bandwidth_bytes_s
            self.bandwidth_bytes_s = sample if old is None else old + _WEIGHT * (sample - old)
            self._busy_since, self._sample_bytes = now, 0
        if idle:
            self._busy_since, self._sample_bytes = None, 0
