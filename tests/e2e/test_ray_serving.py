"""The product through its front door: HAProxy, ingress, prefill engine, UCX, decode engine, each its own process."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from support.launcher import Launcher, command_of, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.ucx, pytest.mark.redis]

Oracle = Callable[[Path, list[int], int], list[int]]
PROMPTS = [[(7 * row + 3 * column) % 90 + 5 for column in range(length)] for row, length in enumerate((4, 17, 75, 201))]


@pytest.fixture
def client(cluster: Launcher) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.base_url, timeout=60) as client:
        yield client


def completion(prompt: list[int], **fields: object) -> dict[str, object]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
    return body | {"ignore_eos": True} | fields


def token_ids(client: httpx.Client, prompt: list[int], **fields: object) -> list[int]:
    response = client.post("/v1/completions", json=completion(prompt, **fields))
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


def streamed_ids(client: httpx.Client, body: dict[str, object]) -> list[int]:
    """Token ids of all chunks; checks that the stream ends as it must."""
    found: list[int] = []
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line.removeprefix("data: "))
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            found += choice.get("token_ids") or []
    return found


def test_an_answer_has_one_id(client: httpx.Client) -> None:
    """Guards the client's own id, which Serve and the application both put on the answer: clients read "id, id"."""
    for path in ("/health", "/no-such-route"):
        given = client.get(path, headers={"x-request-id": "mine-7"}).headers
        assert given.get_list("x-request-id") == ["mine-7"]
        (made,) = client.get(path).headers.get_list("x-request-id")
        assert made


def blocks(client: httpx.Client) -> dict[tuple[str, str], float]:
    """(engine, state) -> KV blocks, from the metrics of whichever replica answers."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        match = re.match(r'kvbaton_engine_kv_blocks\{engine="([^"]+)",role="[^"]+",state="(\w+)"\} (\S+)', line)
        if match:
            found[match[1], match[2]] = float(match[3])
    return found


def test_the_screen_shows_what_was_started(cluster: Launcher) -> None:
    """Guards what a new user reads: pools, transport, a command that works."""
    output = cluster.output
    assert re.search(r"engine-0/\d+ +prefill +ready", output)
    assert re.search(r"engine-1/\d+ +decode +ready", output)
    assert re.search(r"UCX +engine-0 -> engine-1: \S+", output)
    assert f"curl -N {cluster.base_url}/v1/chat/completions" in output


def test_tokens_equal_transformers(
    client: httpx.Client, tiny_model: Callable[[str], Path], oracle_tokens: Oracle
) -> None:
    for prompt in PROMPTS:
        expected = oracle_tokens(tiny_model("llama"), prompt, 24)
        assert token_ids(client, prompt) == expected
        assert streamed_ids(client, completion(prompt)) == expected


def test_sixteen_at_once_equal_each_alone(client: httpx.Client, cluster: Launcher) -> None:
    prompts = [[(11 * row + column) % 90 + 5 for column in range(9 + 13 * row)] for row in range(16)]
    alone = [token_ids(client, prompt, seed=5, temperature=0.9) for prompt in prompts]

    def ask(prompt: list[int]) -> list[int]:
        with httpx.Client(base_url=cluster.base_url, timeout=60) as own:
            return streamed_ids(own, completion(prompt, seed=5, temperature=0.9))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_long_prompts_travel_between_engines(client: httpx.Client) -> None:
    """Guards against a cluster that looks split and serves everything on one engine."""
    before = placed_pairs(client)
    for start in range(20):  # whichever replica takes it: some replica's count must rise above all seen before
        token_ids(client, [start + 5] * 150, max_tokens=1 + start)
        if placed_pairs(client) > before:
            return
    raise AssertionError(f"20 long prompts, and still {before} pairs placed")


def placed_pairs(client: httpx.Client) -> float:
    """Pairs placed by the replica that placed most, over a few reads."""
    texts = [client.get("/metrics", headers={"Connection": "close"}).text for _ in range(6)]
    return max(float(re.findall(r"^kvbaton_requests_placed_pairs_total (\S+)", text, re.M)[0]) for text in texts)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("padding", [0, 20_000], ids=["short-body", "long-body"])
def test_a_client_that_leaves_gives_every_block_back(
    client: httpx.Client, cluster: Launcher, stream: bool, padding: int
) -> None:
    """Guards against stranded KV behind HAProxy, for bodies past its buffer too. The request takes 5 s and more."""
    prompt = [(3 * i) % 90 + 5 for i in range(120)]
    body = json.dumps(completion(prompt, max_tokens=8000, n=2, stream=stream, user="x" * padding)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    url = httpx.URL(cluster.base_url)
    with socket.create_connection((url.host, url.port or 80)) as own:
        own.sendall(head + body)
        assert wait_until(lambda: held(client) > 0, 10)
    assert wait_until(lambda: held(client) == 0, 2), blocks(client)


def held(client: httpx.Client) -> float:
    return sum(count for (_, state), count in blocks(client).items() if state == "held")


def test_a_killed_decode_engine_costs_no_token(
    client: httpx.Client, cluster: Launcher, tiny_model: Callable[[str], Path], oracle_tokens: Oracle
) -> None:
    """Guards the promise of the name: the stream goes on where it was, and a new generation takes the place."""
    prompt = [(5 * i) % 90 + 5 for i in range(80)]
    expected = oracle_tokens(tiny_model("llama"), prompt, 600)
    found: list[int] = []
    with client.stream("POST", "/v1/completions", json=completion(prompt, max_tokens=600, stream=True)) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                found += choice.get("token_ids") or []
            if len(found) == 40:
                engine_process(cluster, "engine-1").kill()
    assert found == expected
    cluster.wait_line("engine-1/2 (decode) ready", 60)
    assert "raylet" not in cluster.output  # Ray's own account of it is a page long, and goes to a file
    assert wait_until(lambda: client.get("/ready").status_code == 200, 30)
    assert token_ids(client, PROMPTS[2]) == oracle_tokens(tiny_model("llama"), PROMPTS[2], 24)


def last_generation(cluster: Launcher, engine_id: str) -> int:
    return max(int(number) for number in re.findall(rf"{engine_id}/(\d+)", cluster.output))


def engine_process(cluster: Launcher, engine_id: str) -> psutil.Process:
    """The Ray worker that runs an engine: it listens on the port that the pools show, or was started later."""
    workers = sorted(
        (process for process in cluster.family() if command_of(process).startswith("ray::EngineActor")),
        key=lambda process: process.create_time(),
    )
    port = int(re.findall(rf"{engine_id}/\d+ .*?127\.0\.0\.1:(\d+)", cluster.output)[-1])
    listening = [
        process
        for process in workers
        if any(item.laddr.port == port and item.status == psutil.CONN_LISTEN for item in process.net_connections())
    ]
    return listening[0] if listening else workers[-1]


def test_an_engine_that_hangs_is_replaced(
    client: httpx.Client, cluster: Launcher, tiny_model: Callable[[str], Path], oracle_tokens: Oracle
) -> None:
    """Guards what Ray cannot see: a process that is there and does nothing. Its requests go on elsewhere meanwhile."""
    hung = engine_process(cluster, "engine-1")
    generation = last_generation(cluster, "engine-1")
    hung.suspend()
    try:
        cluster.wait_line(f"engine-1/{generation + 1} (decode) ready", 90)
        assert token_ids(client, PROMPTS[3]) == oracle_tokens(tiny_model("llama"), PROMPTS[3], 24)
        assert wait_until(lambda: not hung.is_running(), 30)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            hung.resume()


def test_a_killed_manager_comes_back_and_knows_its_engines(
    client: httpx.Client, cluster: Launcher, tiny_model: Callable[[str], Path], oracle_tokens: Oracle
) -> None:
    """Guards "never on the request path", and against engines that a new manager forgets or starts twice."""
    cluster.child("ray::ManagerActor").kill()
    assert token_ids(client, PROMPTS[2]) == oracle_tokens(tiny_model("llama"), PROMPTS[2], 24)
    assert wait_until(lambda: cluster.has_child("ray::ManagerActor"), 60)
    engine_process(cluster, "engine-0").kill()
    cluster.wait_line("engine-0/2 (prefill) ready", 60)
    assert not [line for line in cluster.lines if "engine-2" in line]
    assert token_ids(client, PROMPTS[3]) == oracle_tokens(tiny_model("llama"), PROMPTS[3], 24)


def test_what_the_launcher_adds_listens_on_loopback_only(cluster: Launcher) -> None:
    """Guards "loopback by default" for HAProxy, its side doors included, and the state server."""
    doors = {
        (process.name().partition("-")[0], item.laddr.ip)
        for process in cluster.family()
        if process.name().startswith(("haproxy", "valkey"))
        for item in process.net_connections("tcp")
        if item.status == psutil.CONN_LISTEN
    }
    assert doors == {("haproxy", "127.0.0.1"), ("valkey", "127.0.0.1")}


def test_the_state_server_may_go_away(
    cluster: Launcher, client: httpx.Client, tiny_model: Callable[[str], Path], oracle_tokens: Oracle
) -> None:
    """Guards serving without the store: known engines go on, as do metrics. Last here: the server stays away."""
    cluster.child("valkey-server").kill()
    for prompt in PROMPTS * 3:
        assert token_ids(client, prompt) == oracle_tokens(tiny_model("llama"), prompt, 24)
    assert client.get("/ready").status_code == 200
    assert "kvbaton_engine_up" in client.get("/metrics").text
