"""`kvbaton bench serve` as a user runs it, against a scripted server: exit status, bodies, JSON, PNG, Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from kvbaton.cluster.bench import serve
from kvbaton.cluster.bench.options import UsageError, parse_options
from kvbaton.cluster.bench.report import Report
from kvbaton.cluster.bench.serve import EXIT_ALL_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, main
from support.scripted_openai import Reply, Script, ScriptedServer, answer_all


@contextmanager
def running(script: Script = answer_all, **options: Any) -> Iterator[ScriptedServer]:
    """A scripted server on a thread and loop of its own: `main` owns this thread's loop and its signals."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = ScriptedServer(script, **options)
    try:
        asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10)
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def bench(server: ScriptedServer, arguments: str) -> int:
    return main(["--url", server.url, *arguments.split()])


def loaded(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = orjson.loads(path.read_bytes())
    return document


@pytest.mark.slow
def test_a_run_writes_table_json_and_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the whole path once: counts in the JSON, labels in the table, a real PNG."""
    json_path, png_path = tmp_path / "r.json", tmp_path / "r.png"
    with running() as server:
        status = bench(
            server,
            f"--concurrency 3 --num-requests 12 --input-tokens 20 --output-tokens 6 --warmup 1 --slo ttft=60,tpot=60 "
            f"--token-times --json {json_path} --png {png_path} --api-key s3cret",
        )
    assert status == EXIT_OK
    document = loaded(json_path)
    summary = document["report"]["summary"]
    assert document["schema"] == "kvbaton.bench.serve/1"
    assert (summary["completed"], summary["failed"], summary["tokens"]["output"]) == (12, 0, 72)
    assert summary["tokens"] == {"input": 240, "output": 72, "cached": 0, "short_answers": 0}
    assert summary["peak_in_flight"] == 3
    assert summary["goodput"]["good"] == 12
    assert [len(row["token_times_s"]) for row in document["requests"]] == [6] * 12
    assert b"s3cret" not in json_path.read_bytes()
    assert png_path.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    for label in ("TTFT (from schedule)", "TTFT (from sending)", "TPOT", "ITL", "E2E", "goodput", "µs CPU a token"):
        assert label in table


def test_requests_say_what_was_asked() -> None:
    """Guards the body: token ids from the server's vocabulary, exact lengths, streaming, usage, token ids in chunks."""
    with running() as server:
        assert bench(server, "--num-requests 3 --input-tokens 9 --output-tokens 5 --warmup 0") == EXIT_OK
    for body in server.bodies:
        assert len(body["prompt"]) == 9
        assert set(body["prompt"]) <= set(range(10, 60))  # what /tokenize knows
        assert {key: value for key, value in body.items() if key != "prompt"} == {
            "model": "scripted",
            "max_tokens": 5,
            "min_tokens": 5,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }


def test_flags_change_the_body() -> None:
    """Guards --vocab-size, --stop-at-eos, --temperature and --extra-body."""
    arguments = "--num-requests 1 --warmup 0 --vocab-size 3 --stop-at-eos --temperature 0.5"
    with running(tokenize=False) as server:
        status = main(["--url", server.url, *arguments.split(), "--extra-body", '{"seed": 5, "min_tokens": 2}'])
    assert status == EXIT_OK
    (body,) = server.bodies
    assert set(body["prompt"]) <= {0, 1, 2}
    assert "ignore_eos" not in body
    assert (body["temperature"], body["seed"], body["min_tokens"]) == (0.5, 5, 2)


def test_the_seed_decides_every_prompt() -> None:
    """Guards reproducibility across runs, with shared prefixes and drawn lengths."""
    flags = (
        "--concurrency 1 --num-requests 6 --input-tokens 4:30 --output-tokens 1:9 --prefix-tokens 16 --prefix-groups 2"
    )
    sent = []
    for seed in (1, 1, 2):
        with running() as server:
            assert bench(server, f"{flags} --seed {seed}") == EXIT_OK
        sent.append([(body["prompt"], body["max_tokens"]) for body in server.bodies])
    assert sent[0] == sent[1]
    assert sent[0] != sent[2]


def test_a_trace_is_replayed_with_its_prefixes(tmp_path: Path) -> None:
    """Guards trace replay end to end: lengths, shared blocks, and the count of those left out as too long."""
    trace = tmp_path / "t.jsonl"
    rows = [(0, 1000, 3, [0, 1]), (40, 700, 4, [0, 2]), (60, 9000, 5, [0, 3])]
    trace.write_bytes(
        b"\n".join(
            orjson.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": ids})
            for t, i, o, ids in rows
        )
    )
    result = tmp_path / "r.json"
    with running(max_model_len=4096) as server:
        assert bench(server, f"--trace {trace} --speed 4 --warmup 0 --json {result}") == EXIT_OK
    first, second = server.bodies
    assert (len(first["prompt"]), len(second["prompt"])) == (1000, 700)
    assert first["prompt"][:512] == second["prompt"][:512]
    assert first["prompt"][512:520] != second["prompt"][512:520]
    document = loaded(result)
    assert document["report"]["too_long"] == 1
    assert [row["scheduled_s"] for row in document["requests"]] == [0.0, 0.01]


async def refuse_all(reply: Reply) -> None:
    if reply.warmup:
        await answer_all(reply)
    else:
        reply.error(503, "no engines")


async def refuse_odd(reply: Reply) -> None:
    if reply.number % 2 and not reply.warmup:
        reply.error(429, "busy")
    else:
        await answer_all(reply)


def test_exit_status_when_all_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards scripts: a run without one completed request is an error, and its table is still printed."""
    with running(refuse_all) as server:
        assert bench(server, "--num-requests 4 --input-tokens 8 --output-tokens 4") == EXIT_ALL_FAILED
    assert "4 × http 503: no engines" in capsys.readouterr().out


def test_exit_status_when_some_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a partial failure: status 0, errors counted by kind."""
    with running(refuse_odd) as server:
        assert bench(server, "--num-requests 6 --concurrency 1 --output-tokens 4 --warmup 0") == EXIT_OK
    assert "3 × http 429: busy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model other", "model 'other' is not served; listed: scripted"),
        ("--rate 2 --concurrency 2", "to cap an open loop use --max-in-flight"),
        ("--num-requests 2 --duration 3", "not both"),
        ("--input-tokens 0", "length '0'"),
        ("--slo itl=2", "expected ttft=SECONDS"),
        ("--limit 3", "--limit needs --trace"),
        ("--trace missing.jsonl", "cannot read the trace"),
        ("--trace missing.jsonl --prefix-tokens 4", "a trace brings its own prefixes"),
        ("--extra-body [1]", "must be a JSON object"),
        ("--concurrency 2 --max-in-flight 3", "caps an open loop"),
    ],
)
def test_usage_errors_exit_two(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a stack trace for a mistake on the command line."""
    with running() as server:
        assert bench(server, arguments) == EXIT_USAGE
    assert message in " ".join(capsys.readouterr().out.split())


def test_no_server_exits_two(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the commonest mistake: nothing listens."""
    with running() as server:
        url = server.url
    assert main(["--url", url]) == EXIT_USAGE
    assert "cannot connect to 127.0.0.1" in capsys.readouterr().out


def test_no_tokenize_asks_for_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards endpoints without /tokenize: the message says which flag helps."""
    with running(tokenize=False) as server:
        assert bench(server, "") == EXIT_USAGE
    assert "give --vocab-size" in capsys.readouterr().out


def test_a_failing_warmup_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a long run of errors: what fails alone fails at once, with the server's words."""

    async def script(reply: Reply) -> None:
        reply.error(400, "ignore_eos is not known here")

    with running(script) as server:
        assert bench(server, "") == EXIT_USAGE
        assert len(server.bodies) == 1
    assert "ignore_eos is not known here" in capsys.readouterr().out


def test_ctrl_c_prints_partial_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards an early stop: what completed is reported and written, what was under way is counted as given up."""
    result = tmp_path / "r.json"

    async def script(reply: Reply) -> None:
        if reply.number < 2:
            await answer_all(reply)
            return
        reply.start()
        reply.token(1)
        if reply.number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        await reply.gone()

    with running(script) as server:
        status = bench(
            server, f"--concurrency 2 --num-requests 50 --warmup 0 --output-tokens 4 --json {result} --no-progress"
        )
    assert status == EXIT_INTERRUPTED
    summary = loaded(result)["report"]["summary"]
    assert (summary["completed"], summary["interrupted"], summary["failed"]) == (2, 2, 0)
    assert "stopped early" in capsys.readouterr().out


def test_a_second_ctrl_c_does_not_cut_off_the_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards an impatient user, and `timeout -s INT`, which signals twice: the table and the JSON still come."""
    result = tmp_path / "r.json"
    print_report = serve.print_report

    async def script(reply: Reply) -> None:
        reply.start()
        os.kill(os.getpid(), signal.SIGINT)
        await reply.gone()

    def interrupted_report(console: Console, report: Report) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        print_report(console, report)

    monkeypatch.setattr(serve, "print_report", interrupted_report)
    with running(script) as server:
        assert bench(server, f"--concurrency 1 --warmup 0 --json {result}") == EXIT_INTERRUPTED
    assert loaded(result)["report"]["summary"]["interrupted"] == 1
    assert "stopped early" in capsys.readouterr().out


def test_ctrl_c_before_the_run_is_no_stack_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards a stop while the endpoint is slow to answer the warm-up."""

    async def script(reply: Reply) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await reply.gone()

    with running(script) as server:
        assert bench(server, "") == EXIT_INTERRUPTED
    assert "stopped before anything was measured" in capsys.readouterr().out


def test_duration_ends_a_closed_loop() -> None:
    """Guards --duration without a number of requests: it ends by itself, having sent something."""
    with running() as server:
        assert bench(server, "--concurrency 2 --duration 0.2 --output-tokens 2 --warmup 0") == EXIT_OK
        assert len(server.bodies) >= 2


def test_duration_cuts_the_arrivals_of_an_open_loop() -> None:
    """Guards --duration in an open loop: exactly the arrivals of that span are sent, however fast the server is."""
    with running() as server:
        assert bench(server, "--rate 200 --duration 0.25 --output-tokens 2 --warmup 0 --seed 7") == EXIT_OK
        first = len(server.bodies)
    with running() as server:
        assert bench(server, "--rate 200 --duration 0.25 --output-tokens 2 --warmup 0 --seed 7") == EXIT_OK
        assert len(server.bodies) == first
    assert 20 < first < 90


@pytest.mark.parametrize(
    ("arguments", "closed", "rate", "count"),
    [
        ("", 8, None, 100),
        ("--rate 3", None, 3.0, 100),
        ("--concurrency 4 --num-requests 9", 4, None, 9),
        ("--trace x.csv", None, None, None),
        ("--trace x.csv --rate 2", None, 2.0, None),
        ("--trace x.csv --concurrency 5", 5, None, None),
        ("--rate 3 --duration 9", None, 3.0, None),
    ],
)
def test_which_arrivals_follow(arguments: str, closed: int | None, rate: float | None, count: int | None) -> None:
    """Guards the defaults: which flags make which loop, and how many requests."""
    arrivals = parse_options(arguments.split()).arrivals
    assert (arrivals.concurrency, arrivals.rate, arrivals.num_requests) == (closed, rate, count)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against keys on command lines, where every user of the machine can read them."""
    monkeypatch.setenv("OPENAI_API_KEY", "from-env")
    assert parse_options([]).target.api_key == "from-env"


def test_bad_json_body_is_a_usage_error() -> None:
    """Guards --extra-body against a stack trace."""
    with pytest.raises(UsageError):
        parse_options(["--extra-body", "{"])
