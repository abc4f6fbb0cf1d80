"""Guards what UCX is told: our defaults, the environment over them, and a clear error instead of a substitute."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvbaton.kvtransfer.ucx_library import is_loopback, ucx_config


@pytest.fixture(autouse=True)
def _no_ucx_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [n for n in os.environ if n.startswith("UCX_")]:
        monkeypatch.delenv(name)


def test_host_memory_goes_eager_and_gpu_memory_keeps_rendezvous() -> None:
    host = ucx_config("10.0.0.1", on_gpu=False, overrides={})
    gpu = ucx_config("10.0.0.1", on_gpu=True, overrides={})
    assert (host["RNDV_THRESH"], host["ZCOPY_THRESH"]) == ("inf", "0")
    assert "RNDV_THRESH" not in gpu
    assert host["POSIX_ERROR_HANDLING"] == gpu["SYSV_ERROR_HANDLING"] == "y"


def test_the_environment_wins_and_overrides_win_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_RNDV_THRESH", "8192")
    assert "RNDV_THRESH" not in ucx_config("10.0.0.1", on_gpu=False, overrides={})
    assert ucx_config("10.0.0.1", on_gpu=False, overrides={"RNDV_THRESH": "1"})["RNDV_THRESH"] == "1"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("node7", False),
    ],
)
def test_a_loopback_engine_keeps_ucx_on_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    assert ucx_config(host, on_gpu=False, overrides={}).get("NET_DEVICES") == ("lo" if loopback else None)


@pytest.mark.process
def test_without_ucxx_the_transport_refuses_and_names_the_package() -> None:
    """And the rest of kvtransfer imports without it."""
    code = """
import sys
sys.modules["ucxx"] = None
import kvbaton.kvtransfer.agent
from kvbaton.kvtransfer.transport import TransportError
from kvbaton.kvtransfer.ucx import UcxTransport
try:
    UcxTransport(None)
except TransportError as error:
    sys.exit(0 if "install ucxx-cu13" in str(error) else 1)
sys.exit(2)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
