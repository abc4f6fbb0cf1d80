"""The session plane on uvloop, which the processes of a cluster run on: its transports are not asyncio's classes."""

from __future__ import annotations

import asyncio

import uvloop

from kvbaton.cluster.session.client import SessionClient
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineLoad
from support.session_support import SECRET, Listener, ScriptedEngine, make_request, start_server, until


async def _round_trip() -> tuple[ScriptedEngine, Listener]:
    engine, listener = ScriptedEngine(), Listener()
    server, info = await start_server(engine, None)
    client = SessionClient(info, SECRET, "ingress-1", listener)
    await client.connect()
    client.submit(Submit(make_request(prompt_tokens=50_000), LegKind.LOCAL))
    await until(engine.changed, lambda: bool(engine.submits))
    server.publish(engine.submits[0][0], [TokenOutput("r1", 0, 0, 0, 40)], EngineLoad())
    await until(listener.changed, lambda: bool(listener.frames))
    await client.close()
    await until(engine.changed, lambda: bool(engine.lost))
    await server.close()
    return engine, listener


def test_a_request_and_its_token_travel_on_uvloop() -> None:
    """Guards against a check of the transport's class, which only fails in the real processes."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        engine, listener = runner.run(_round_trip())
    assert len(engine.submits) == 1
    assert [output.token_id for output in listener.outputs] == [40]
