"""Settings of a transfer agent, and who the agent is. Frozen; checked once when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Identity(Protocol):
    """An engine incarnation. `PeerAddress` is one too."""

    @property
    def engine_id(self) -> str: ...

    @property
    def generation(self) -> int: ...


CHECKSUM_OFF = "off"
CHECKSUMS = (CHECKSUM_OFF, "crc32c", "xxh3")


class TransferSettingsError(ValueError):
    """A setting that cannot work; the message names it."""


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """Times are seconds.

    `lease_s`: prefill's hold on a hand-off of which decode says nothing, and the silence after which a session with
    open hand-offs counts as dead. `drain_s`: how long a cancelled hand-off may wait for the peer to finish its
    operations before the session is closed to make them end; `answer_s`: how long, where the peer says nothing at all
    meanwhile, though it was asked. `stall_s`: announced blocks of which none arrives for so
    long fail their hand-off. `bandwidth_floor_bytes_s`: a slower pair is logged as a warning; 0 is off.
    `max_strangers`: connections that may be in their handshake at a time. `checksum`: one of CHECKSUMS, of each block,
    the same at both engines; blocks in host memory only (see checksum.py).
    """

    lease_s: float = 10.0
    connect_s: float = 5.0
    drain_s: float = 2.0
    answer_s: float = 1.0
    stall_s: float = 30.0
    send_window: int = 8
    max_handoffs_per_session: int = 4096
    max_blocks_per_handoff: int = 1 << 17
    max_payload_bytes: int = 1 << 20
    max_strangers: int = 64
    bandwidth_floor_bytes_s: float = 0.0
    checksum: str = CHECKSUM_OFF

    def __post_init__(self) -> None:
        for name in (
            "lease_s",
            "connect_s",
            "drain_s",
            "answer_s",
            "stall_s",
            "send_window",
            "max_handoffs_per_session",
            "max_payload_bytes",
            "max_strangers",
        ):
            if getattr(self, name) <= 0:
                raise TransferSettingsError(f"{name} must be positive, not {getattr(self, name)}")
        if self.checksum not in CHECKSUMS:
            raise TransferSettingsError(f"checksum must be one of {', '.join(CHECKSUMS)}, not {self.checksum!r}")
        if not 0 < self.max_blocks_per_handoff < 1 << 24:
            raise TransferSettingsError(
                f"max_blocks_per_handoff must be in 1..2^24-1, not {self.max_blocks_per_handoff}"
            )

    @property
    def renew_s(self) -> float:
        """Interval between two RENEWs: a third of the lease, so that two may be late."""
        return self.lease_s / 3
