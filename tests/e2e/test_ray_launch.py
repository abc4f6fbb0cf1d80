"""The life of a launch: what it refuses, and that nothing outlives it, however it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kvbaton.cluster.preflight import check_redis
from kvbaton.cluster.valkey import EmbeddedValkey
from support.launcher import Launcher, survivors, wait_until

TinyModel = Callable[[str], Path]


def refusal(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "kvbaton.cluster.cli", "serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.returncode, result.stdout + result.stderr


def test_a_port_in_use(tiny_model: TinyModel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, output = refusal("--model", str(tiny_model("llama")), "--port", str(port), "--device", "cpu")
    assert status == 1
    assert f"error: port {port} on 127.0.0.1 is in use by" in output
    assert "Traceback" not in output


def test_a_missing_model(tmp_path: Path) -> None:
    status, output = refusal("--model", str(tmp_path / "none"), "--port", "0")
    assert status == 1
    assert str(tmp_path / "none") in output
    assert "Traceback" not in output


def test_a_redis_that_is_down(tiny_model: TinyModel) -> None:
    arguments = (
        "--model",
        str(tiny_model("llama")),
        "--port",
        "0",
        "--device",
        "cpu",
        "--redis",
        "redis://127.0.0.1:1",
    )
    status, output = refusal(*arguments)
    assert status == 1
    assert "127.0.0.1:1" in output
    assert "Traceback" not in output


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("keep_bytes", [None, 18, 20_000], ids=["missing", "no-header", "cut-short"])
def test_weights_that_are_not_whole(tiny_model: TinyModel, tmp_path: Path, keep_bytes: int | None) -> None:
    """Guards against half a minute of start-up for a download that was broken off."""
    folder = copy_of(tiny_model("llama"), tmp_path / "damaged")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    if keep_bytes is not None:
        (folder / "model.safetensors").write_bytes(weights[:keep_bytes])
    status, output = refusal("--model", str(folder), "--port", "0", "--device", "cpu")
    assert status == 1
    assert f"error: {folder / 'model.safetensors'} is " in output
    assert "state " not in output
    assert "Traceback" not in output


@pytest.mark.ray
def test_damaged_weights_end_the_launch_with_the_reason(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Guards against a launcher that waits for ever, or leaves Ray behind, when an engine cannot load."""
    folder = copy_of(tiny_model("llama"), tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    launcher = Launcher(folder, "--prefill", "0", "--decode", "0", "--hybrid", "1")
    try:
        line = launcher.wait_line("did not start")
        family = launcher.family()
        assert "error: engine-0 (hybrid) did not start" in line
        assert "lacks tensor model.norm.weight" in line
        assert launcher.process.wait(60) == 1
        assert survivors(family, 5.0) == []
    finally:
        launcher.close()


def run_dir(launcher: Launcher) -> Path:
    """Where this launch keeps its files, as it says itself."""
    return Path(launcher.wait_line("its logs in").partition("its logs in ")[2].split()[0])


@pytest.mark.ray
@pytest.mark.redis
def test_a_killed_launcher_takes_everything_with_it(tiny_model: TinyModel) -> None:
    """Guards against orphans after `kill -9` or a crash: engines, Ray, HAProxy, the state server and files all go."""
    arguments = ("--prefill", "0", "--decode", "0", "--hybrid", "1", "--kv-memory", "16MiB")
    launcher = Launcher(tiny_model("llama"), *arguments)
    try:
        folder = run_dir(launcher)
        launcher.wait_ready()
        family = launcher.family()
        assert any("haproxy" in process.name() for process in family)
        assert any("valkey" in process.name() for process in family)
        assert launcher.stop(signal.SIGKILL) == -signal.SIGKILL
        assert survivors(family, 20.0) == []
        assert wait_until(lambda: not folder.exists(), 10)
    finally:
        launcher.close()


@pytest.mark.ray
@pytest.mark.redis
def test_sigterm_during_start_leaves_nothing(tiny_model: TinyModel) -> None:
    """Guards the moment when half of it is up; and the user's own Redis must live on."""
    server = EmbeddedValkey()
    arguments = ("--redis", server.start())
    launcher = Launcher(tiny_model("llama"), *arguments)
    try:
        folder = run_dir(launcher)
        launcher.wait_line("engines")
        family = launcher.family()
        assert launcher.stop(signal.SIGTERM) == 0
        assert survivors(family, 5.0) == []
        assert launcher.lines[-1] == "stopped"
        assert not folder.exists()
        check_redis(server.url, "kvbaton")
    finally:
        launcher.close()
        server.stop()
