"""Guards what makes a late frame harmless: each is bound to both incarnations and has one place in its direction."""

from __future__ import annotations

import pytest

from kvbaton.kvtransfer.frame_numbers import FrameNumbers
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.kvtransfer.wire import AckMessage, BlocksMessage, DoneMessage, GrantMessage, Handle, Message, WireError

P, D = PeerAddress("p", 3, "h", 1), PeerAddress("d", 7, "h", 2)
HANDLE = Handle("r", 0, 1)
MESSAGES: list[Message] = [
    GrantMessage(HANDLE, 1 << 63, 0, 4),
    BlocksMessage(HANDLE, 0, 4),
    DoneMessage(HANDLE, 4, b"p"),
    AckMessage(HANDLE),
]


def end(address: PeerAddress) -> FrameNumbers:
    return FrameNumbers(address.generation, 1024)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_an_older_incarnations_word_is_refused_by_name(message: Message) -> None:
    old = end(PeerAddress("p", 2, "h", 1))
    with pytest.raises(WireError, match=r"frame from generation 2, session is with .*generation=3"):
        end(D).unpack(old.pack(message, D), P)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_word_to_an_older_incarnation_is_refused_by_name(message: Message) -> None:
    to_old = end(P).pack(message, PeerAddress("d", 6, "h", 2))
    with pytest.raises(WireError, match="frame for generation 6, this is 7"):
        end(D).unpack(to_old, P)


def test_a_frame_that_is_lost_or_doubled_shows() -> None:
    sender, receiver = end(P), end(D)
    frames = [sender.pack(message, D) for message in MESSAGES]
    assert receiver.unpack(frames[0], P) == MESSAGES[0]
    with pytest.raises(WireError, match="frame 0 came where 1 was due"):
        receiver.unpack(frames[0], P)
    with pytest.raises(WireError, match="frame 2 came where 1 was due"):
        receiver.unpack(frames[2], P)
    assert [receiver.unpack(frame, P) for frame in frames[1:]] == MESSAGES[1:]


def test_before_the_handshake_nobody_is_heard() -> None:
    with pytest.raises(WireError, match="session is with None"):
        end(D).unpack(end(P).pack(MESSAGES[0], D), None)
