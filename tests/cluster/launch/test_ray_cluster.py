"""The private cluster's environment: nothing in a shared place, no port that another is given."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.cluster.launch.ports import PortClaims
from kvbaton.cluster.launch.ray_cluster import make_run_dir, private_environment


@pytest.fixture
def claims() -> Iterator[PortClaims]:
    with closing(PortClaims()) as claims:
        yield claims


def test_a_replaced_haproxy_outlives_the_longest_response(tmp_path: Path, claims: PortClaims) -> None:
    """Guards long streams: each change of the replicas replaces HAProxy, and Serve cuts the old one's after 2 min."""
    http = HttpConfig(request_timeout_s=5000.5, shutdown_timeout_s=7.0)
    assert int(private_environment(tmp_path, http, claims)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == 5061


def test_two_launches_share_nothing(tmp_path: Path) -> None:
    """Guards a second launch on one machine: equal ports or files would make it fail or, worse, mix with the first."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with closing(PortClaims()) as ours, closing(PortClaims()) as theirs:
        first = private_environment(folders[0], HttpConfig(), ours)
        second = private_environment(folders[1], HttpConfig(), theirs)
    own = [name for name in first if str(tmp_path) in first[name] or name == "RAY_AUTH_TOKEN"]
    assert [name for name in own if first[name] == second[name]] == []
    ports = [environment[name] for environment in (first, second) for name in first if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 10
    assert "/tmp/haproxy-serve" not in " ".join(first.values())


def test_the_guard_script_is_for_the_owner_only(tmp_path: Path, claims: PortClaims) -> None:
    environment = private_environment(tmp_path, HttpConfig(port=8123), claims)
    script = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert " 8123 " in script.read_text()


def test_the_run_dir_is_private_and_short_enough_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, claims: PortClaims
) -> None:
    """Guards long TMPDIRs: HAProxy refuses a socket path above 97 bytes, and says so half a minute later."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("deep" * 10)))
    run_dir = make_run_dir()
    try:
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        environment = private_environment(run_dir, HttpConfig(), claims)
        folder, name = os.path.split(environment["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        assert len(os.path.join(folder, 56 * "f", name)) <= 97
    finally:
        for path in run_dir.iterdir():
            path.unlink()
        run_dir.rmdir()
