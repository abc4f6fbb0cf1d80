"""The life of a launch: what it refuses, and that nothing outlives it, however it ends."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from kvbaton.cluster.launch.ports import PortClaims
from kvbaton.cluster.launch.preflight import check_redis
from kvbaton.cluster.store.valkey import EmbeddedValkey
from support.launcher import Launcher, survivors, wait_until

TinyModel = Callable[[str], Path]


def refusal(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "kvbaton.cluster.cli", "serve", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.process
def test_a_port_in_use(tiny_model: TinyModel) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, output = refusal("--model", str(tiny_model("llama")), "--port", str(port), "--device", "cpu")
    assert status == 2
    assert f"error: port {port} on 127.0.0.1 is in use by" in output
    assert "Traceback" not in output


@pytest.mark.process
def test_a_missing_model(tmp_path: Path) -> None:
    status, output = refusal("--model", str(tmp_path / "none"), "--port", "0")
    assert status == 2
    assert str(tmp_path / "none") in output
    assert "Traceback" not in output


@pytest.mark.process
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
    assert status == 2
    assert "127.0.0.1:1" in output
    assert "Traceback" not in output


@pytest.mark.process
def test_of_two_launches_that_race_for_a_port_one_goes_on(tiny_model: TinyModel) -> None:
    """Guards against a second launch that passes the check, starts everything, and then shares or misses the port."""
    with closing(PortClaims()) as claims:
        (port,) = claims.free(1)
    arguments = ("--port", str(port), "--prefill", "0", "--decode", "0", "--hybrid", "1")
    folder = Path("/tmp") / secrets.token_hex(2)  # short: a launch does not take a longer one
    folder.mkdir()
    environment = {"TMPDIR": str(folder)}
    launchers = [Launcher(tiny_model("llama"), *arguments, environment=environment) for _ in range(2)]
    try:
        assert wait_until(lambda: any(each.process.poll() is not None for each in launchers), 60)
        loser, winner = sorted(launchers, key=lambda each: each.process.poll() is None)
        assert loser.stop() == 2
        assert f"error: another launch (pid {winner.process.pid}) is about to use port {port};" in loser.output
        assert "Traceback" not in loser.output
        winner.wait_line("✓ checks")
        assert len(list(folder.glob("kvbaton-*"))) == 1
        assert winner.stop(signal.SIGTERM) == 0
        assert list(folder.glob("kvbaton-*")) == []
    finally:
        for each in launchers:
            each.close()
        shutil.rmtree(folder)


def copy_of(model: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.process
@pytest.mark.parametrize("keep_bytes", [None, 18, 20_000], ids=["missing", "no-header", "cut-short"])
def test_weights_that_are_not_whole(tiny_model: TinyModel, tmp_path: Path, keep_bytes: int | None) -> None:
    """Guards against half a minute of start-up for a download that was broken off."""
    folder = copy_of(tiny_model("llama"), tmp_path / "damaged")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    if keep_bytes is not None:
        (folder / "model.safetensors").write_bytes(weights[:keep_bytes])
    status, output = refusal("--model", str(folder), "--port", "0", "--device", "cpu")
    assert status == 2
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


ENDLESS = {"prompt": [5] * 90, "max_tokens": 8000, "n": 8, "temperature": 0, "ignore_eos": True}
SHUTTING_DOWN = {
    "message": "the server is shutting down",
    "type": "server_error",
    "param": None,
    "code": "service_unavailable",
}


def streamed(url: str, body: dict[str, Any], begun: threading.Event) -> list[str]:
    """The events of a stream; raises where its body is cut."""
    events = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line:
                events.append(line.removeprefix("data: "))
                begun.set()
    return events


def in_flight(url: str) -> int:
    """Sequences that decode, as the metrics of any replica tell it, over the choices of a request."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    running = [line for line in lines if line.startswith("kvbaton_engine_requests{") and 'state="running"' in line]
    return sum(int(float(line.split()[1])) for line in running) // 8


@pytest.mark.ray
@pytest.mark.redis
def test_responses_that_do_not_end_in_time_say_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Guards against bodies that are cut: what ends within `shutdown_timeout_s` is whole, the rest ends with an error,
    a stream's as an event without [DONE] behind it, another's as a 503."""
    config = tmp_path / "cluster.yaml"
    config.write_text("http:\n  shutdown_timeout_s: 6\n")
    arguments = ("--config", str(config), "--prefill", "0", "--decode", "0", "--hybrid", "1", "--replicas", "2")
    launcher = Launcher(tiny_model("llama"), *arguments)
    with ThreadPoolExecutor(9) as pool, closing(launcher):
        url = launcher.wait_ready().base_url
        answers = [pool.submit(httpx.post, f"{url}/v1/completions", json=ENDLESS, timeout=60) for _ in range(4)]
        begun = [threading.Event() for _ in range(5)]
        streams = [pool.submit(streamed, url, ENDLESS, each) for each in begun[1:]]
        assert wait_until(lambda: in_flight(url) == 8, 30)
        in_time = pool.submit(streamed, url, ENDLESS | {"max_tokens": 16}, begun[0])
        assert all(each.wait(30) for each in begun)
        assert launcher.stop(signal.SIGTERM) == 0
        assert in_time.result()[-1] == "[DONE]"
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json() == {"error": SHUTTING_DOWN}
        for stream in streams:
            *chunks, last = stream.result()
            assert json.loads(last) == {"error": SHUTTING_DOWN}
            assert all("error" not in json.loads(chunk) for chunk in chunks)
            assert chunks
        assert [line.partition(" (")[0] for line in launcher.lines[-2:]] == ["stopping ...", "stopped"]
