"""What a session asks of the agent that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbaton.kvtransfer.checksum import BlockSums
from kvbaton.kvtransfer.handshake import Hello
from kvbaton.kvtransfer.messages import Event
from kvbaton.kvtransfer.receiver import ReceiveHandoff
from kvbaton.kvtransfer.settings import TransferSettings
from kvbaton.kvtransfer.wire import Handle

if TYPE_CHECKING:
    from kvbaton.kvtransfer.session import Session


@dataclass(frozen=True, slots=True)
class SessionOwner:
    """`opened`: the peer is authenticated. `offered`: False refuses the offer. `forgotten`: a hand-off is over.

    `sums` is None where blocks have no checksum.
    """

    generation: int
    block_bytes: int
    settings: TransferSettings
    sums: BlockSums | None
    emit: Callable[[Event], None]
    opened: Callable[[Session, Hello], None]
    offered: Callable[[Session, ReceiveHandoff], bool]
    forgotten: Callable[[Handle], None]
