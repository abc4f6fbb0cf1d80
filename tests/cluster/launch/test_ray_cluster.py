"""The private cluster's environment: nothing in a shared place, no port that another is given."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.cluster.launch import ray_cluster
from kvbaton.cluster.launch.ray_cluster import free_ports, make_run_dir, private_environment
from kvbaton.engine.config import ConfigError


def test_free_ports_are_distinct_free_and_outside_the_ranges_of_others() -> None:
    """Guards against a port that the kernel or Ray hands to somebody between the choice and its use."""
    ports = free_ports(50)
    assert len(set(ports)) == 50
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(19999 < port < min(low, 30000) for port in ports)


def test_free_ports_pass_over_taken_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ray_cluster, "_PORTS", range(port, port + 1))
        with pytest.raises(ConfigError, match="no 1 free TCP ports"):
            free_ports(1)
    assert free_ports(1) == [port]


def test_a_replaced_haproxy_outlives_the_longest_response(tmp_path: Path) -> None:
    """Guards long streams: each change of the replicas replaces HAProxy, and Serve cuts the old one's after 2 min."""
    http = HttpConfig(request_timeout_s=5000.5, shutdown_timeout_s=7.0)
    assert int(private_environment(tmp_path, http)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == 5061


def test_two_launches_share_nothing(tmp_path: Path) -> None:
    """Guards a second launch on one machine: equal ports or files would make it fail or, worse, mix with the first."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = (private_environment(folder, HttpConfig()) for folder in folders)
    for name in first:
        if name.endswith("_PORT") or str(tmp_path) in first[name] or name == "RAY_AUTH_TOKEN":
            assert first[name] != second[name], name
    assert "/tmp/haproxy-serve" not in " ".join(first.values())


def test_the_guard_script_is_for_the_owner_only(tmp_path: Path) -> None:
    environment = private_environment(tmp_path, HttpConfig(port=8123))
    script = Path(environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(script.stat().st_mode) == 0o700
    assert " 8123 " in script.read_text()


def test_the_run_dir_is_private_and_short_enough_for_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards long TMPDIRs: HAProxy refuses a socket path above 97 bytes, and says so half a minute later."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("deep" * 10)))
    run_dir = make_run_dir()
    try:
        assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
        environment = private_environment(run_dir, HttpConfig())
        folder, name = os.path.split(environment["RAY_SERVE_HAPROXY_SOCKET_PATH"])
        assert len(os.path.join(folder, 56 * "f", name)) <= 97
    finally:
        for path in run_dir.iterdir():
            path.unlink()
        run_dir.rmdir()
