"""What the network between toy engines does to messages, and a check of who may touch which block meanwhile.

Faults strike where a message leaves a node: one-shot ones hit its next control frame or block, or the next receive that
it posts; a delay holds back what it names until `release`. So blocks can arrive long after the control frames that end
their hand-off.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.handoff_payload import encode_first_tokens
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.kvtransfer.codec import WireError, pack
from kvbaton.kvtransfer.wire import (
    AckMessage,
    BlocksMessage,
    CancelMessage,
    DoneMessage,
    FailMessage,
    Frame,
    GrantMessage,
    Handle,
    decode_frame,
)
from support.faulty_transport import Fault, FaultyChannel, FaultyTransport
from support.loopback import LoopbackChannel

WRONG_TOKEN = encode_first_tokens({0: 1})


class Weather:
    """A `FaultPlan` that a test sets while the cluster runs."""

    def __init__(self) -> None:
        self._once: dict[str, Fault] = {}
        self._delayed: set[str] = set()

    def strike(self, what: str, fault: Fault) -> None:
        """The next "control" frame, "done" frame or "block" that leaves, or "landing" that is posted here, meets
        `fault`."""
        self._once[what] = fault

    def delay(self, what: str) -> None:
        """From now on "control" frames, "block"s, or what the ingress sends over its "session", are held back."""
        self._delayed.add(what)

    def delays(self, what: str) -> bool:
        return what in self._delayed

    def clear(self) -> None:
        self._once.clear()
        self._delayed.clear()

    def on_control(self, data: bytes) -> Fault:
        if "done" in self._once and _is_done(data):
            return self._once.pop("done")
        return self._next("control")

    def on_block(self, tag: int) -> Fault:
        return self._next("block")

    def on_landing(self, tag: int) -> Fault:
        """One-shot "landing" faults alone: a delay is the sender's."""
        return self._once.pop("landing", Fault.PASS)

    def _next(self, what: str) -> Fault:
        return self._once.pop(what, Fault.DELAY if what in self._delayed else Fault.PASS)


class Touched(Protocol):
    """An engine whose transfers are looked at."""

    name: str
    worker: Worker
    transport: FaultyTransport

    @property
    def kv(self) -> KVManager: ...


def assert_only_owners_are_touched(node: Touched) -> None:
    """Every block that a transfer may still write belongs to a landing, every one that it may still read to an outgoing
    hand-off, and either has a holder. Guards blocks given back while the network still has them."""
    name, kv, worker = node.name, node.kv, node.worker
    sent = (*worker.prefill.outgoing.held(), *worker.decode.migrations.held())
    landing = {block for holding in worker.decode.arrivals.held() for block in holding.blocks}
    outgoing = {block for holding in sent for block in holding.blocks}
    for channel in node.transport.channels.values():
        for block in written(channel):
            assert block in landing, f"{name}: block {block} may be written but no landing has it"
            assert kv.holders(block) == 1, f"{name}: landing block {block} has {kv.holders(block)} holders"
        for block in read(channel):
            assert block in outgoing, f"{name}: block {block} may be read but no hand-off has it"
            assert kv.holders(block), f"{name}: block {block} may be read but nobody holds it"


def written(channel: FaultyChannel) -> list[int]:
    """Blocks of this end with a posted receive."""
    return _loopback(channel).writable_blocks


def read(channel: FaultyChannel) -> list[int]:
    """Blocks of this end that are on their way, or held back."""
    return [*_loopback(channel).readable_blocks, *channel.held_blocks]


def old_words(transport: FaultyTransport) -> bool:
    """An earlier incarnation of a peer says DONE, with a token that is not the one of now, for each hand-off of which
    nothing else is missing here, in frames that are numbered as if they were next. False if there is none."""
    said = False
    for channel in transport.channels.values():
        end = _loopback(channel)
        heard = [] if end.closed or channel.lost() is not None else _frames(channel.heard)
        if not heard:
            continue
        last = heard[-1]
        for number, done in enumerate(_all_announced(heard, _frames(channel.said)), last.number + 1):
            end.hear(pack(Frame(number, last.source_generation - 1, last.target_generation, done)))
            said = True
    return said


def _all_announced(heard: list[Frame], said: list[Frame]) -> list[DoneMessage]:
    """The DONE that is due for each hand-off whose blocks are all on their way here."""
    due: dict[Handle, DoneMessage] = {}
    for message in (frame.message for frame in said):
        if isinstance(message, GrantMessage):
            due[message.handle] = DoneMessage(message.handle, message.count, WRONG_TOKEN)
    announced = dict.fromkeys(due, 0)
    for message in (frame.message for frame in [*heard, *said]):
        if isinstance(message, BlocksMessage) and message.handle in due:
            announced[message.handle] += message.count
        elif isinstance(message, AckMessage | CancelMessage | FailMessage):
            due.pop(message.handle, None)
    return [done for handle, done in due.items() if announced[handle] == done.num_sent]


def _frames(data: list[bytes]) -> list[Frame]:
    """Those of the open session; the handshake's are left out."""
    frames = []
    for item in data:
        with contextlib.suppress(WireError):
            frames.append(decode_frame(item, len(item)))
    return frames


def _is_done(data: bytes) -> bool:
    try:
        return isinstance(decode_frame(data, len(data)).message, DoneMessage)
    except WireError:  # a frame of the handshake
        return False


def _loopback(channel: FaultyChannel) -> LoopbackChannel:
    assert isinstance(channel.inner, LoopbackChannel)
    return channel.inner
