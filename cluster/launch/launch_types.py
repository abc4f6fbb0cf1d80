"""The values that the parts of a launch share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.cluster.launch.preflight import Preflight
from kvbaton.cluster.store.store import StoreAddress


class LaunchFailed(Exception):
    """A part of the cluster did not start; the message is fit for an operator."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: what was asked for, what was found, where things are. `secret` is the cluster's."""

    config: ClusterConfig
    preflight: Preflight
    run_dir: Path
    store: StoreAddress
    secret: bytes = field(repr=False)
