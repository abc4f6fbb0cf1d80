"""The launcher's first request, against a small HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.cluster.launch import first_request
from kvbaton.cluster.launch.first_request import send_first_request
from kvbaton.cluster.launch.preflight import Launch, LaunchFailed
from kvbaton.engine.config import EngineConfig
from kvbaton.router.engine_info import EngineInfo


@contextmanager
def answering(statuses: list[int]) -> Iterator[str]:
    """Answers each request with the next status, the last one for ever."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            body = json.dumps({"error": {"message": f"says {status}"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(url: str) -> float:
    config = ClusterConfig(engine=EngineConfig(Path("tiny")))
    launch = SimpleNamespace(config=config, preflight=SimpleNamespace(model=SimpleNamespace(vocab_size=512)))
    engine = SimpleNamespace(block_size=16, max_model_len=512)
    return send_first_request(url, cast(Launch, launch), [cast(EngineInfo, engine)])


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_request, "_RETRY_S", 0.01)


def test_it_waits_for_a_service_that_is_not_ready_yet() -> None:
    """An engine that is silent for a moment on a busy machine must not end the launch."""
    statuses = [503, 503, 200]
    with answering(statuses) as url:
        send(url)
    assert statuses == [200]


def test_it_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_request, "_UNREADY_S", -1.0)
    with answering([503]) as url, pytest.raises(LaunchFailed, match="HTTP 503: says 503"):
        send(url)


def test_other_failures_end_the_launch_at_once() -> None:
    statuses = [500, 200]
    with answering(statuses) as url, pytest.raises(LaunchFailed, match="HTTP 500: says 500"):
        send(url)
    assert statuses == [200]


def test_nobody_there() -> None:
    with answering([200]) as url:
        pass
    with pytest.raises(LaunchFailed, match="no answer"):
        send(url)
