"""The hand-offs that are open at one engine, on either side and over any peer, and the blocks that they write.

Sessions put the offers of their peers here and take out what is over; the agent finds here what a command speaks of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.handoff import key_of
from kvbaton.kvtransfer.messages import Cause, Event, Failed, HandoffCounts, HandoffKey, Released
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.transport import BlockMemory
from kvbaton.kvtransfer.wire import Handle


class OpenHandoffs:
    """At most one hand-off of a key on each side. Changed on the agent's thread alone; `counts` is read on any.

    `sums` is how blocks of `memory` are summed, None where they are not; `on_event` is the worker's ear.
    """

    def __init__(self, memory: BlockMemory, sums: BlockSums | None, on_event: Callable[[Event], None]) -> None:
        self.block_bytes = memory.block_bytes
        self.sums = sums
        self.senders: dict[HandoffKey, SendHandoff] = {}
        self.receivers: dict[HandoffKey, ReceiveHandoff] = {}
        self.landing = LandingBlocks(memory.num_blocks)
        self.counts = HandoffCounts()
        self._on_event = on_event

    def add_receiver(self, receiver: ReceiveHandoff) -> bool:
        """A peer offers it; False, and nothing is added, where one of its key is open already."""
        return self.receivers.setdefault(key_of(receiver.handle), receiver) is receiver

    def forget(self, handle: Handle) -> None:
        """A hand-off is over: no operation can touch its blocks any more."""
        key = key_of(handle)
        if key in self.senders and self.senders[key].handle == handle:
            del self.senders[key]
        if key in self.receivers and self.receivers[key].handle == handle:
            del self.receivers[key]
            self.landing.release(key)

    def emit(self, event: Event) -> None:
        """Tell the worker, and count how hand-offs end."""
        counts = self.counts
        if isinstance(event, Failed) and event.cause not in (Cause.CANCELLED, Cause.FINISHED):
            wrong = counts.checksum_failures + (event.cause is Cause.CHECKSUM)
            self.counts = replace(counts, failed=counts.failed + 1, checksum_failures=wrong)
        elif isinstance(event, Released) and event.acked:
            self.counts = replace(counts, acked=counts.acked + 1)
        self._on_event(event)


class LandingBlocks:
    """Which blocks of the pool are being written by which hand-off: no block ever has two writers.

    Claims are all or nothing and end with the hand-off.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._claimed: dict[HandoffKey, tuple[int, ...]] = {}
        self._owned: set[int] = set()

    def claim(self, key: HandoffKey, block_ids: tuple[int, ...]) -> str | None:
        """Claim the blocks for `key`. Returns why that is impossible; None when they are claimed."""
        wanted = set(block_ids)
        if len(wanted) != len(block_ids):
            return "a block is listed twice"
        if any(not 0 <= b < self._num_blocks for b in wanted):
            return f"block ids outside the pool of {self._num_blocks}"
        if taken := wanted & self._owned:
            return f"block {min(taken)} is landing for another hand-off"
        self._claimed[key] = block_ids
        self._owned |= wanted
        return None

    def release(self, key: HandoffKey) -> None:
        self._owned.difference_update(self._claimed.pop(key, ()))
