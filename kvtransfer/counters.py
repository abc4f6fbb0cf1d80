"""What an agent counts: the running sums of its sessions, those that are over included, and how hand-offs ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbaton.kvtransfer.messages import Event, Failed, Released
from kvbaton.kvtransfer.stats import TransferStats, peer_stats

if TYPE_CHECKING:
    from kvbaton.kvtransfer.session import Session


class TransferCounters:
    """Written on the agent's thread, read on any; see `TransferAgent.stats`."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._retired = TransferStats()
        self._failed = 0
        self._acked = 0

    def on_event(self, event: Event) -> None:
        self._failed += isinstance(event, Failed)
        self._acked += isinstance(event, Released) and event.acked

    def retire(self, session: Session) -> None:
        """A session is over: its numbers stay."""
        self._retired = self._sum((session,))

    def stats(self, sessions: Sequence[Session], sending: int, receiving: int) -> TransferStats:
        """`sessions` are the open ones, the other two the open hand-offs."""
        total = self._sum(sessions)
        return TransferStats(
            bytes_sent=total.bytes_sent,
            bytes_received=total.bytes_received,
            messages=total.messages,
            handoffs_failed=self._failed,
            handoffs_acked=self._acked,
            checksum_failures=total.checksum_failures,
            sending=sending,
            receiving=receiving,
            quarantined_blocks=sum(s.quarantined_blocks() for s in sessions),
            peers=tuple(p for s in sessions if (p := peer_stats(s)) is not None),
        )

    def _sum(self, sessions: Sequence[Session]) -> TransferStats:
        over = self._retired
        return TransferStats(
            bytes_sent=over.bytes_sent + sum(s.meter.bytes_sent for s in sessions),
            bytes_received=over.bytes_received + sum(s.blocks_received for s in sessions) * self._block_bytes,
            messages=over.messages + sum(s.messages for s in sessions),
            checksum_failures=over.checksum_failures + sum(s.checksum_failures for s in sessions),
        )
