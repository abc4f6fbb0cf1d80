"""Bandwidth and latency of one pair of engines, from the traffic itself; only RENEW's stamp is sent to measure."""

from __future__ import annotations

MIN_SAMPLE_BYTES = 4 << 20
_WEIGHT = 0.25  # of the newest sample


class LinkMeter:
    """Bytes over the time in which at least one send was running; the best round trip of late."""

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
