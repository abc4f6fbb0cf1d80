"""Ports of a launch: who was first has one, whoever else is told at once, and chosen ones are nobody else's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.cluster.launch.ports import PortClaims, check_port
from kvbaton.settings import ConfigError

HTTP = HttpConfig(port=19_999)


def refused(check: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        check()
    return str(caught.value)


def test_the_second_launch_is_told_who_has_the_port_and_what_else_there_is() -> None:
    with closing(PortClaims()) as first, closing(PortClaims()) as second:
        first.endpoint(HTTP)
        message = refused(lambda: second.endpoint(HttpConfig(host="0.0.0.0", port=19_999)))
        assert f"another launch (pid {os.getpid()}) is about to use port 19999;" in message
        assert "--port 2" in message
        second.endpoint(HttpConfig(port=19_998))
        first.close()
        second.endpoint(HTTP)


@pytest.mark.process
def test_a_killed_launch_lets_go() -> None:
    """Guards against a port that stays claimed after a crash."""
    program = (
        "from kvbaton.cluster.config.cluster_config import HttpConfig\n"
        "from kvbaton.cluster.launch.ports import PortClaims\n"
        "claims = PortClaims()\n"
        "claims.endpoint(HttpConfig(port=19_999))\n"
        "print(flush=True)\n"
        "input()\n"
    )
    launch = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert launch.stdout is not None
    launch.stdout.readline()
    with closing(PortClaims()) as claims:
        assert f"(pid {launch.pid})" in refused(lambda: claims.endpoint(HTTP))
        launch.send_signal(signal.SIGKILL)
        launch.communicate()
        claims.endpoint(HTTP)


def test_free_ports_are_distinct_free_and_outside_the_ranges_of_others() -> None:
    """Guards against a port that the kernel or Ray hands to somebody between the choice and its use."""
    with closing(PortClaims()) as claims:
        ports = claims.free(50)
    assert len(set(ports)) == 50
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(19999 < port < min(low, 30000) for port in ports)


def test_free_ports_pass_over_taken_ones() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        claims = PortClaims(range(port, port + 1))
        assert refused(lambda: claims.free(1)) == f"no 1 free TCP ports from {port} to {port}"
    with closing(claims):
        assert claims.free(1) == [port]


def test_a_port_that_one_launch_has_chosen_is_not_chosen_by_another() -> None:
    """Guards two launches that choose at the same time: nobody listens on the ports of the first yet."""
    candidates = range(19_900, 19_920)
    with closing(PortClaims(candidates)) as first, closing(PortClaims(candidates)) as second:
        ours = first.free(8)
        assert set(ours).isdisjoint(second.free(8))
        assert "another launch" in refused(lambda: second.endpoint(HttpConfig(port=ours[0])))
        assert "no 8 free" in refused(lambda: second.free(8))
        first.close()
        second.endpoint(HttpConfig(port=ours[0]))


def test_a_port_in_use_is_refused_with_its_owner_and_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(lambda: check_port(HttpConfig(port=port)))
    assert f"port {port} on 127.0.0.1 is in use by" in message
    assert f"(pid {os.getpid()})" in message
    other = int(message.rpartition("--port ")[2].split()[0])
    check_port(HttpConfig(port=other))


def test_the_launchs_own_listener_is_no_stranger() -> None:
    """Guards what a failed start says: that HAProxy of this very launch has the port tells nobody anything."""
    with socket.create_server(("127.0.0.1", 0)) as own:
        http = HttpConfig(port=own.getsockname()[1])
        check_port(http, ours=[os.getpid()])
        assert "is in use by" in refused(lambda: check_port(http, ours=[os.getpid() + 1]))


def test_a_port_left_in_time_wait_is_free() -> None:
    """Guards against refusing a quick restart: HAProxy sets SO_REUSEADDR, so the check must."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first keeps TIME_WAIT
        client.close()
    check_port(HttpConfig(port=port))


def test_an_address_of_another_machine_is_refused() -> None:
    assert "cannot listen on 192.0.2.77:8000" in refused(lambda: check_port(HttpConfig(host="192.0.2.77")))
    assert "is not an address" in refused(lambda: check_port(HttpConfig(host="no.such.host.invalid")))
