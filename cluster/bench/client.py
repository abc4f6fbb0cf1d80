"""One streamed completion: sends it, times every token, and says what came of it.

    body -> POST /v1/completions -> SSE chunks -> Tally -> RequestRecord

Every chunk is timed in the callback that delivers its bytes. Nothing that a server does raises here: a failure is a
record that names its kind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from kvbaton.cluster.bench.connection import ConnectionFailed, HttpClient
from kvbaton.cluster.bench.record import INTERRUPTED, Failure, RequestRecord, Timeline

Clock = Callable[[], float]
DONE = b"[DONE]"
MAX_MESSAGE = 200  # bytes or characters of a server's message that are kept


class SseDecoder:
    """Server-sent events from body bytes cut anywhere: the `data` of each, without comments and other fields."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The payloads of the events that this chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class Tally:
    """What the chunks of one reply add up to. Fed from the connection's callback."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sse = SseDecoder()
        self._body: list[bytes] = []
        self.chunk_times: list[float] = []
        self.token_times: list[float] = []
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None
        self.done = False
        self.failure: Failure | None = None

    def feed(self, data: bytes) -> None:
        """Body bytes, called as they arrive."""
        now_s = self._clock()
        events = self._sse.feed(data)
        if not self.chunk_times and len(self._body) < 16:
            self._body.append(data)  # kept for the message of an error reply, which is not SSE
        for event in events:
            self._event(event, now_s)

    def _event(self, event: bytes, now_s: float) -> None:
        if event == DONE:
            self.done = True
            return
        try:
            chunk = orjson.loads(event)
            if chunk.get("error"):
                self.failure = Failure("stream error", _error_message(event))
                return
            if chunk.get("usage"):
                self.usage = chunk["usage"]
            for choice in chunk["choices"]:
                self._choice(choice, now_s)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            self.failure = Failure("bad chunk", f"{error!r} in {event[:MAX_MESSAGE]!r}")

    def _choice(self, choice: dict[str, Any], now_s: float) -> None:
        token_ids = choice.get("token_ids")
        if token_ids:
            self.token_times.extend([now_s] * len(token_ids))
        if token_ids or choice.get("text"):
            self.chunk_times.append(now_s)
        if choice.get("finish_reason"):
            self.finish_reason = choice["finish_reason"]

    def verdict(self, status: int) -> Failure | None:
        """What is wrong with the finished reply, if anything."""
        if status != 200:
            return Failure(f"http {status}", _error_message(b"".join(self._body)))
        if self.failure is not None:
            return self.failure
        if not self.done and self.finish_reason is None:
            return Failure("truncated", "the stream ended without a finish reason or [DONE]")
        if not self.chunk_times:
            return Failure("no tokens", "the stream ended well but carried no token")
        return None

    @property
    def exact(self) -> bool:
        """Every chunk named its tokens, so token times are complete."""
        return bool(self.token_times) and len(self.token_times) >= len(self.chunk_times)

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(self.token_times if self.exact else self.chunk_times)


def _error_message(body: bytes) -> str:
    """The message of an OpenAI-style error body, or the start of whatever it is."""
    try:
        error = orjson.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:MAX_MESSAGE]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return body[:MAX_MESSAGE].decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Job:
    """One request ready to go: its encoded body, when it was due, and what it asks for."""

    index: int
    body: bytes
    scheduled_s: float
    input_tokens: int
    asked_tokens: int


class CompletionClient:
    """Sends jobs to `/v1/completions`. `clock` gives seconds since the run's start."""

    def __init__(self, http: HttpClient, clock: Clock, timeout_s: float) -> None:
        self._http = http
        self._clock = clock
        self._timeout_s = timeout_s

    async def run(self, job: Job) -> RequestRecord:
        """Stream one completion to its end. A cancelled run is recorded as interrupted, with the tokens so far."""
        tally = Tally(self._clock)
        sent_s = self._clock()
        failure: Failure | None
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await self._http.stream("/v1/completions", job.body, tally.feed)
            failure = tally.verdict(status)
        except TimeoutError:
            failure = Failure("timeout", f"no end within {self._timeout_s:g} s")
        except ConnectionFailed as error:
            failure = Failure("connection", str(error))
        except asyncio.CancelledError:
            failure = Failure(INTERRUPTED, "the run was stopped")
        return _record(job, tally, Timeline(job.scheduled_s, sent_s, self._clock(), tally.times), failure)


def _record(job: Job, tally: Tally, timeline: Timeline, failure: Failure | None) -> RequestRecord:
    usage = tally.usage
    details = usage.get("prompt_tokens_details") or {}
    return RequestRecord(
        index=job.index,
        timeline=timeline,
        input_tokens=usage.get("prompt_tokens") or job.input_tokens,
        output_tokens=len(tally.token_times) if tally.exact else usage.get("completion_tokens") or len(tally.times),
        asked_tokens=job.asked_tokens,
        cached_tokens=details.get("cached_tokens"),
        exact_tokens=tally.exact,
        finish_reason=tally.finish_reason,
        failure=failure,
    )
