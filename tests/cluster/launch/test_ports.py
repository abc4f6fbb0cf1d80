"""Two launches and one port: who was first has it, whoever else is told at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.cluster.launch.port_claim import PortClaim
from kvbaton.engine.config import ConfigError

HTTP = HttpConfig(port=19_999)


def test_the_second_is_told_who_has_it_and_what_else_there_is() -> None:
    first = PortClaim(HTTP)
    with pytest.raises(ConfigError) as refusal:
        PortClaim(HttpConfig(host="0.0.0.0", port=19_999))
    assert f"another launch (pid {os.getpid()}) is starting on port 19999;" in str(refusal.value)
    assert "--port 2" in str(refusal.value)
    other = PortClaim(HttpConfig(port=19_998))
    first.close()
    first.close()
    again = PortClaim(HTTP)
    again.close()
    other.close()


@pytest.mark.process
def test_a_killed_launch_lets_go() -> None:
    """Guards against a port that stays claimed after a crash."""
    program = (
        "from kvbaton.cluster.config.cluster_config import HttpConfig\n"
        "from kvbaton.cluster.launch.port_claim import PortClaim\n"
        "claim = PortClaim(HttpConfig(port=19_999))\n"
        "print(flush=True)\n"
        "input()\n"
    )
    launch = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert launch.stdout is not None
    launch.stdout.readline()
    with pytest.raises(ConfigError, match=rf"\(pid {launch.pid}\)"):
        PortClaim(HTTP)
    launch.send_signal(signal.SIGKILL)
    launch.communicate()
    PortClaim(HTTP).close()
