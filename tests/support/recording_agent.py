"""A transfer agent that only writes down what it was asked, for tests of one engine's bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.kvtransfer.messages import Cause, GivenUp, HandoffCounts, HandoffKey, Landing, Offer, PeerAddress


class RecordingAgent:
    """Satisfies `HandoffCommands`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def offer(self, offer: Offer, peer: PeerAddress) -> None:
        self.calls.append(("offer", offer))

    def blocks_ready(self, key: HandoffKey, block_ids: Sequence[int]) -> None:
        self.calls.append(("blocks_ready", tuple(block_ids)))

    def finish(self, key: HandoffKey, payload: bytes) -> None:
        self.calls.append(("finish", payload))

    def grant(self, key: HandoffKey, landing: Landing) -> None:
        self.calls.append(("grant", landing))

    def ack(self, key: HandoffKey) -> None:
        self.calls.append(("ack", key))

    def cancel(self, key: HandoffKey, reason: str, cause: GivenUp = Cause.CANCELLED) -> None:
        self.calls.append(("cancel", (reason, cause)))

    def counts(self) -> HandoffCounts:
        return HandoffCounts()

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]
