"""What a worker may ask of its transfer agent. Every call is thread-safe, returns at once and is answered by events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbaton.kvtransfer.messages import Cause, GivenUp, HandoffCounts, HandoffKey, Landing, Offer, PeerAddress


class HandoffCommands(Protocol):
    """The command half of `TransferAgent`, so that workers can be tested without one."""

    def offer(self, offer: Offer, peer: PeerAddress) -> None: ...

    def blocks_ready(self, key: HandoffKey, block_ids: Sequence[int]) -> None:
        """The next blocks of the prompt, in order, are written and may be sent."""
        ...

    def finish(self, key: HandoffKey, payload: bytes) -> None:
        """All blocks were announced; `payload` travels with DONE."""
        ...

    def grant(self, key: HandoffKey, landing: Landing) -> None: ...

    def ack(self, key: HandoffKey) -> None: ...

    def cancel(self, key: HandoffKey, reason: str, cause: GivenUp = Cause.CANCELLED) -> None:
        """End a hand-off in any state, on either side; `Released` follows. Unknown keys are ignored.

        The peer hears `Failed` with the cause. FINISHED: nothing is wrong, and nothing is left to hand over.
        """
        ...

    def counts(self) -> HandoffCounts:
        """How hand-offs have ended so far; cheap enough for every step."""
        ...
