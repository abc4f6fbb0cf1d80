"""A cluster client's settings and counters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Interval

from kvbaton.cluster.session.connection import SessionLimits
from kvbaton.settings import Count, Setting, check


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """`park_s` is how long a request that had begun waits for an engine when none is left; `full_wait_s`, how long one
    that had not waits for room where the engines turned out to be full.

    `request_timeout_s` bounds requests that do not bring a limit of their own, None: not at all. `max_in_flight`
    requests at a time; `max_migrations` sequences at a time leave one engine that drains.
    """

    max_resumes: Annotated[
        int,
        Interval(ge=0, le=100),
        Setting("router.max_resumes", "how often one request may be resumed before it fails"),
    ] = 3
    park_s: float = 30.0
    full_wait_s: float = 1.0
    limits: SessionLimits = field(default_factory=SessionLimits)
    request_timeout_s: float | None = None
    max_in_flight: Count = 16384
    max_migrations: Count = 4

    def __post_init__(self) -> None:
        check(self)


@dataclass(slots=True)
class ClientCounters:
    """What happened to requests since the start, for metrics."""

    placed_pairs: int = 0
    placed_local: int = 0
    refused: int = 0
    resumed: int = 0
    lost: int = 0
    stale_outputs: int = 0
    timed_out: int = 0
    migrated: int = 0
    migrations_failed: int = 0
