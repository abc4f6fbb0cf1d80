"""What an agent counts: the running sums of its sessions, those that are over included, and how hand-offs ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvbaton.kvtransfer.messages import Cause, Event, Failed, HandoffCounts, Released
from kvbaton.kvtransfer.stats import TransferStats, peer_stats

if TYPE_CHECKING:
    from kvbaton.kvtransfer.session import Session


class TransferCounters:
    """Written on the agent's thread, read on any; see `TransferAgent.stats`."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._retired = TransferStats()
        self.handoffs = HandoffCounts()

    def on_event(self, event: Event) -> None:
        counts = self.handoffs
        if isinstance(event, Failed) and event.cause not in (Cause.CANCELLED, Cause.FINISHED):
            wrong = counts.checksum_failures + (event.cause is Cause.CHECKSUM)
            self.handoffs = replace(counts, failed=counts.failed + 1, checksum_failures=wrong)
        elif isinstance(event, Released) and event.acked:
            self.handoffs = replace(counts, acked=counts.acked + 1)

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
            handoffs_failed=self.handoffs.failed,
            handoffs_acked=self.handoffs.acked,
            checksum_failures=self.handoffs.checksum_failures,
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
        )
