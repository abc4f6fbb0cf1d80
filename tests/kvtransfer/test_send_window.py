"""Guards the send window: never more than its size in flight, in order, aborts decided late; and late grants once."""

from __future__ import annotations

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.send_window import MAX_LATE_GRANTS, LateGrants, SendWindow
from kvbaton.kvtransfer.stats import LinkMeter
from kvbaton.kvtransfer.wire import Handle
from support.recording_link import Receive, RecordingLink

BLOCK_BYTES = 100


class SendingChannel(RecordingLink):
    """The sending third of a Channel: (tag, block) for data, (tag, None) for an abort."""

    def __init__(self) -> None:
        super().__init__()
        self.posted: list[tuple[int, int | None]] = []
        self.operations: list[Receive] = []

    def post_send(self, tag: int, block_id: int) -> Receive:
        return self._post(tag, block_id)

    def post_abort(self, tag: int) -> Receive:
        return self._post(tag, None)

    def _post(self, tag: int, block_id: int | None) -> Receive:
        self.posted.append((tag, block_id))
        self.operations.append(Receive(tag, -1 if block_id is None else block_id))
        return self.operations[-1]


class Source:
    """Prompt block i is block 10 + i, under tag 1000 + i."""

    def __init__(self) -> None:
        self.live = True
        self.sent: list[str | None] = []
        self.sums: list[tuple[int, int]] = []

    def source(self, index: int) -> int | None:
        return 10 + index if self.live else None

    def tag(self, index: int) -> int:
        return 1000 + index

    def on_posted(self, index: int, value: int) -> None:
        self.sums.append((index, value))

    def on_sent(self, failure: str | None, now: float) -> None:
        self.sent.append(failure)


def window_of(size: int, sums: BlockSums | None = None) -> tuple[SendWindow, SendingChannel, LinkMeter]:
    channel, meter = SendingChannel(), LinkMeter()
    return SendWindow(channel, BLOCK_BYTES, size, meter, sums), channel, meter  # type: ignore[arg-type]


def test_no_more_than_its_size_is_in_flight_and_order_is_kept() -> None:
    window, channel, meter = window_of(2)
    first, second = Source(), Source()
    for index in range(2):
        window.queue_block(first, index)
    window.queue_block(second, 5)
    assert window.advance(0.0)
    assert channel.posted == [(1000, 10), (1001, 11)]
    assert not window.advance(1.0)
    channel.operations[1].complete()
    assert not window.advance(1.0), "completed sends are taken in posting order"
    channel.operations[0].complete()
    assert window.advance(2.0)
    assert (first.sent, channel.posted[2:]) == ([None, None], [(1005, 15)])
    assert meter.bytes_sent == 2 * BLOCK_BYTES
    channel.operations[2].complete("unreachable")
    assert window.advance(3.0)
    assert second.sent == ["unreachable"]
    assert not window


def test_what_is_given_up_while_it_waits_leaves_as_an_abort() -> None:
    window, channel, _ = window_of(1)
    source = Source()
    for index in range(3):
        window.queue_block(source, index)
    window.advance(0.0)
    source.live = False
    for operation in range(3):
        channel.operations[operation].complete()
        window.advance(0.0)
    assert channel.posted == [(1000, 10), (1001, None), (1002, None)]
    assert source.sent == [None] * 3


def test_aborts_for_nobodys_hand_off_take_their_turn() -> None:
    window, channel, _ = window_of(8)
    window.queue_block(Source(), 0)
    window.queue_aborts(70, 2)
    window.advance(0.0)
    assert channel.posted == [(1000, 10), (70, None), (71, None)]


def test_a_block_is_summed_when_it_is_posted_and_an_abort_is_not() -> None:
    window, channel, _ = window_of(8, BlockSums("plain", lambda block_id: len(channel.posted) * 100 + block_id))
    source = Source()
    window.queue_block(source, 3)
    window.advance(0.0)
    assert source.sums == [(3, 113)]
    source.live = False
    window.queue_block(source, 4)
    window.advance(0.0)
    assert source.sums == [(3, 113)]


def test_a_closed_channel_leaves_nothing_queued_or_running() -> None:
    window, channel, _ = window_of(1)
    source = Source()
    window.queue_block(source, 0)
    window.queue_block(source, 1)
    window.advance(0.0)
    window.clear()
    channel.operations[0].complete()
    assert not window.advance(1.0)
    assert (bool(window), source.sent) == (False, [])


def test_a_late_grant_is_owed_what_was_offered_and_only_once() -> None:
    late = LateGrants()
    late.expect(Handle("r", 0, 1), 5)
    assert late.take(Handle("r", 0, 2)) == 0, "another hand-off of the same request"
    assert late.take(Handle("r", 0, 1)) == 5
    assert late.take(Handle("r", 0, 1)) == 0


def test_grants_that_never_come_are_forgotten_oldest_first() -> None:
    late = LateGrants()
    for serial in range(MAX_LATE_GRANTS + 2):
        late.expect(Handle("r", 0, serial), 1)
    assert [late.take(Handle("r", 0, serial)) for serial in (0, 1, 2, MAX_LATE_GRANTS + 1)] == [0, 0, 1, 1]
