"""A real session server with a scripted engine behind it, and a listener that records what a session client hears."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from kvbaton.cluster.session.client import SessionClient
from kvbaton.cluster.session.connection import SessionLimits
from kvbaton.cluster.session.server import SessionServer
from kvbaton.engine.orders import Migrate, Notice, Submit
from kvbaton.engine.request import Request, SamplingParams, TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role

SECRET = b"cluster secret"


def make_info(engine_id: str = "e1", port: int = 1, **changes: object) -> EngineInfo:
    values: dict[str, object] = {
        "engine_id": engine_id,
        "generation": 1,
        "role": Role.HYBRID,
        "state": EngineState.READY,
        "host": "127.0.0.1",
        "session_port": port,
        "kv_port": 1,
        "model_id": "tiny",
        "max_model_len": 4096,
        "block_size": 16,
        "num_blocks": 1000,
        "prefill_chunk_tokens": 512,
        "max_requests": 4096,
    }
    return EngineInfo(**(values | changes))  # type: ignore[arg-type]


def make_request(request_id: str = "r1", prompt_tokens: int = 4, max_tokens: int = 4, n: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(request_id, tuple(range(1, prompt_tokens + 1)), sampling, tuple(range(n)))


@dataclass
class ScriptedEngine:
    """A session handler that records calls and runs `on_submit`, the script, for each request."""

    on_submit: Callable[[int, Submit], None] = lambda session_id, submit: None
    submits: list[tuple[int, Submit]] = field(default_factory=list)
    aborts: list[tuple[int, str, int | None]] = field(default_factory=list)
    migrations: list[tuple[int, Migrate]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def submit(self, session_id: int, submit: Submit) -> None:
        self.submits.append((session_id, submit))
        self.changed.set()
        self.on_submit(session_id, submit)

    def abort(self, session_id: int, request_id: str, sample: int | None) -> None:
        self.aborts.append((session_id, request_id, sample))
        self.changed.set()

    def migrate_sample(self, session_id: int, order: Migrate) -> None:
        self.migrations.append((session_id, order))
        self.changed.set()

    def session_lost(self, session_id: int) -> None:
        self.lost.append(session_id)
        self.changed.set()


@dataclass
class Listener:
    """Session events, recorded."""

    outputs: list[TokenOutput] = field(default_factory=list)
    loads: list[EngineLoad] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    lost_reasons: list[str] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def step(self, client: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None:
        self.outputs += outputs
        self.loads.append(load)
        self.frames.append(len(outputs))
        self.changed.set()

    def notice(self, client: SessionClient, notice: Notice) -> None:
        self.notices.append(notice)
        self.changed.set()

    def lost(self, client: SessionClient, reason: str) -> None:
        self.lost_reasons.append(reason)
        self.changed.set()


async def until(changed: asyncio.Event, condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait until `condition` holds, looking again at each `changed`; a `TimeoutError` fails the test."""
    async with asyncio.timeout(limit_s):
        while not condition():
            changed.clear()
            await changed.wait()


async def start_server(
    handler: ScriptedEngine, limits: SessionLimits | None = None, engine_id: str = "e1", generation: int = 1
) -> tuple[SessionServer, EngineInfo]:
    server = SessionServer(handler, "127.0.0.1", 0, SECRET, engine_id, generation, limits)
    port = await server.start()
    return server, make_info(engine_id, port, generation=generation)
