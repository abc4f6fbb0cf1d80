"""The blocks that a session sends: a queue of what is granted and ready, and a bounded window of running sends.

Also what it owes where a grant comes too late: receives that are posted for a hand-off that is over must complete.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Protocol

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.stats import LinkMeter
from kvbaton.kvtransfer.transport import Channel, Operation
from kvbaton.kvtransfer.wire import Handle

MAX_LATE_GRANTS = 4096  # older ones are forgotten: their peer fails the hand-off by its own timer


class BlockSource(Protocol):
    """The sending side of a hand-off, as the window sees it. `index` counts the blocks of the prompt."""

    def source(self, index: int) -> int | None:
        """The block to send, asked when its turn has come; None to send its abort."""
        ...

    def tag(self, index: int) -> int: ...

    def on_posted(self, index: int, value: int) -> None:
        """The block is on its way and has the checksum `value`; not called where there are no checksums."""
        ...

    def on_sent(self, failure: str | None, now: float) -> None:
        """One queued block or abort has left, or failed."""
        ...


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
        self._queue: deque[tuple[BlockSource | None, int]] = deque()
        self._running: deque[tuple[Operation, BlockSource | None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._queue or self._running)

    def queue_block(self, source: BlockSource, index: int) -> None:
        self._queue.append((source, index))

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
            operation, source = self._running.popleft()
            taken += 1
            if source is not None:
                source.on_sent(self._channel.failure(operation), now)
        if taken:
            self._meter.on_sent(taken * self._block_bytes, now, idle=not self._running)
        return taken > 0

    def _fill(self, now: float) -> bool:
        posted = 0
        while self._queue and len(self._running) < self._size:
            source, index = self._queue.popleft()
            self._running.append((self._post(source, index), source))
            posted += 1
        if posted:
            self._meter.on_posted(now)
        return posted > 0

    def _post(self, source: BlockSource | None, index: int) -> Operation:
        if source is None:
            return self._channel.post_abort(index)
        block_id = source.source(index)
        if block_id is None:
            return self._channel.post_abort(source.tag(index))
        posted = self._channel.post_send(source.tag(index), block_id)
        if self._sums is not None:  # while the block is already on its way
            source.on_posted(index, self._sums.of(block_id))
        return posted


class LateGrants:
    """Offers of one session that ended before an answer: a GRANT for each may still be on its way, or never come.

    Only so many blocks as were offered are owed, once; a grant for anything else is owed nothing, whoever sends it.
    """

    def __init__(self) -> None:
        self._blocks: OrderedDict[Handle, int] = OrderedDict()

    def expect(self, handle: Handle, num_blocks: int) -> None:
        """The offer of `num_blocks` is over. The newest MAX_LATE_GRANTS are kept."""
        self._blocks[handle] = num_blocks
        if len(self._blocks) > MAX_LATE_GRANTS:
            self._blocks.popitem(last=False)

    def take(self, handle: Handle) -> int:
        """Blocks that a late grant may speak of; 0 for a hand-off that is none of these."""
        return self._blocks.pop(handle, 0)
