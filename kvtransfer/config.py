"""Settings of a transfer agent, and who the agent is. Frozen; checked when built (see `kvbaton.settings`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, get_args

from annotated_types import Ge, Interval

from kvbaton.settings import BYTES, Count, Seconds, Setting, check


class Identity(Protocol):
    """An engine incarnation. `PeerAddress` is one too."""

    @property
    def engine_id(self) -> str: ...

    @property
    def generation(self) -> int: ...


Checksum = Literal["off", "crc32c", "xxh3"]
CHECKSUMS: tuple[str, ...] = get_args(Checksum)
CHECKSUM_OFF: Checksum = "off"


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """`lease_s` is also the silence after which a session with open hand-offs counts as dead. `answer_s`: `drain_s`
    where the peer says nothing at all meanwhile, though it was asked. `stall_s`: announced blocks of which none arrives
    for so long fail their hand-off. `max_strangers`: connections that may be in their handshake at a time.
    """

    ucx_tls: Annotated[
        str, Setting("transfer.ucx_tls", 'UCX_TLS of the processes that engines run in, such as "tcp" or "rc,cuda"')
    ] = "all"
    lease_s: Annotated[
        Seconds,
        Setting("transfer.lease_s", "how long prefill holds finished blocks for a decode engine that says nothing"),
    ] = 10.0
    connect_s: Annotated[Seconds, Setting("transfer.connect_s", "limit on connecting to a peer")] = 5.0
    drain_s: Annotated[
        Seconds,
        Setting(
            "transfer.drain_s",
            "how long a cancelled hand-off may wait for the peer to finish its operations before the session is closed",
        ),
    ] = 2.0
    answer_s: Seconds = 1.0
    stall_s: Seconds = 30.0
    send_window: Annotated[
        int,
        Interval(ge=1, le=4096),
        Setting(
            "transfer.send_window",
            "blocks in flight per pair of engines; more only where a long round trip leaves the link idle",
        ),
    ] = 8
    max_handoffs_per_session: Count = 4096
    max_blocks_per_handoff: Annotated[int, Interval(ge=1, le=(1 << 24) - 1)] = 1 << 17
    max_payload_bytes: Count = 1 << 20
    max_strangers: Count = 64
    bandwidth_floor_bytes_s: Annotated[
        int,
        BYTES,
        Ge(0),
        Setting("transfer.bandwidth_floor", "warn about a pair slower than this, in bytes a second; 0: never"),
    ] = 0
    checksum: Annotated[
        Checksum,
        Setting(
            "transfer.checksum",
            "of each KV block, where it leaves and where it lands; a mismatch fails the hand-off and the request is "
            "computed elsewhere; the same on all engines, off on GPUs, whose blocks never pass through host memory",
        ),
    ] = CHECKSUM_OFF

    def __post_init__(self) -> None:
        check(self)

    @property
    def renew_s(self) -> float:
        """Interval between two RENEWs: a third of the lease, so that two may be late."""
        return self.lease_s / 3
