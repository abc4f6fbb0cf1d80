"""The blocks that a session sends: a queue of what is granted and ready, and a bounded window of running sends."""

from __future__ import annotations

from collections import deque

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.meter import LinkMeter
from kvbaton.kvtransfer.sender import SendHandoff
from kvbaton.kvtransfer.transport import Channel, Operation


class SendWindow:
    """First come, first served: finishing one hand-off early beats finishing all of them late.

    What an entry sends is decided when its turn comes, so the queue of a cancelled hand-off drains as empty aborts.
    """

    def __init__(self, channel: Channel, block_bytes: int, size: int, meter: LinkMeter, sums: BlockSums | None) -> None:
        self._channel = channel
        self._block_bytes = block_bytes
        self._size = size
        self._meter = meter
        self._sums = sums
        self._queue: deque[tuple[SendHandoff | None, int]] = deque()
        self._running: deque[tuple[Operation, SendHandoff | None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue or self._running)

    def queue_block(self, sender: SendHandoff, index: int) -> None:
        self._queue.append((sender, index))

    def queue_aborts(self, first_tag: int, count: int) -> None:
        """Complete receives that a peer has posted for a hand-off that is over here."""
        self._queue.extend((None, tag) for tag in range(first_tag, first_tag + count))

    def advance(self, now: float) -> bool:
        """Take completed sends in posting order and start new ones; True if anything moved."""
        taken = self._reap(now)
        posted = self._fill(now)
        return taken or posted

    def clear(self) -> None:
        """The channel is closed."""
        self._queue.clear()
        self._running.clear()

    def _reap(self, now: float) -> bool:
        taken = 0
        while self._running and self._running[0][0].completed:
            operation, sender = self._running.popleft()
            taken += 1
            if sender is not None:
                sender.on_sent(self._channel.failure(operation), now)
        if taken:
            self._meter.on_sent(taken * self._block_bytes, now, idle=not self._running)
        return taken > 0

    def _fill(self, now: float) -> bool:
        posted = 0
        while self._queue and len(self._running) < self._size:
            sender, index = self._queue.popleft()
            self._running.append((self._post(sender, index), sender))
            posted += 1
        if posted:
            self._meter.on_posted(now)
        return posted > 0

    def _post(self, sender: SendHandoff | None, index: int) -> Operation:
        if sender is None:
            return self._channel.post_abort(index)
        block_id = sender.source(index)
        if block_id is None:
            return self._channel.post_abort(sender.tag(index))
        posted = self._channel.post_send(sender.tag(index), block_id)
        if self._sums is not None:  # while the block is already on its way
            sender.on_posted(index, self._sums.of(block_id))
        return posted
