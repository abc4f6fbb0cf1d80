"""Guards the upkeep of sessions: cut, late, replaced and refused ones, each with a request that depends on it."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import replace

import pytest

from kvbaton.cluster.client.client import ClientConfig
from kvbaton.cluster.client.links import EngineLinks
from kvbaton.cluster.session.client import SessionClient
from kvbaton.cluster.session.connection import SessionLimits
from kvbaton.cluster.session.server import SessionServer
from kvbaton.engine.orders import Notice
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from support.client_support import Stream, cluster, eventually, token_at, whole
from support.session_support import SECRET, ScriptedEngine, make_info, make_request, start_server


class Recorder:
    """What the links tell a client."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.outputs: list[TokenOutput] = []
        self.sessions: dict[str, SessionClient] = {}  # by the engine's id and generation: those that are up

    def step(self, session: SessionClient, outputs: list[TokenOutput], load: EngineLoad) -> None:
        self.outputs += outputs

    def notice(self, session: SessionClient, notice: Notice) -> None: ...

    def connected(self, session: SessionClient, info: EngineInfo, load: EngineLoad) -> None:
        self.told.append(f"connected {info.engine_id}/{info.generation}")
        self.sessions[f"{info.engine_id}/{info.generation}"] = session

    def changed(self, info: EngineInfo) -> None:
        self.told.append(f"changed {info.engine_id} {info.state}")

    def removed(self, engine_id: str) -> None:
        self.told.append(f"removed {engine_id}")

    def lost(self, client: SessionClient, reason: str) -> None:
        del self.sessions[f"{client.info.engine_id}/{client.info.generation}"]
        self.told.append(f"lost {client.info.engine_id}/{client.info.generation}: {reason}")


def make_links(events: Recorder, secret: bytes = SECRET) -> EngineLinks:
    return EngineLinks(secret, "ingress-1", events, SessionLimits())


async def test_cut_connection_is_renewed_and_its_request_goes_on() -> None:
    async with cluster(0, 0, hybrid=1) as c:
        request = make_request(max_tokens=3)
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        c["h0"].tokens(request, [0, 1])
        await stream.has(2)
        attempt = c.client.attempts.working_on("r1", 0)
        assert attempt is not None
        attempt.second.drop("the network went away")
        again = await c["h0"].next_submit(2)
        assert c["h0"].engine.lost == [1]
        assert again.request.emitted == (token_at(0, 0), token_at(0, 1))
        c["h0"].tokens(again.request, [2], last=2)
        await stream.end()
        assert stream.of() == whole(0, 3)


async def test_engine_that_listens_late_is_met_then(caplog: pytest.LogCaptureFixture) -> None:
    """The registry may be ahead of the socket, or the engine's host may be slow: no engine is given up."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    events = Recorder()
    links = make_links(events)
    info = make_info("e1", port)
    links.set_engines((info,))
    await eventually(lambda: "Connect call failed" in caplog.text)
    assert events.sessions == {}
    server = SessionServer(ScriptedEngine(), "127.0.0.1", port, SECRET, "e1", 1)
    await server.start()
    await eventually(lambda: "e1/1" in events.sessions)
    assert events.told == ["connected e1/1"]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1  # not one a try
    await links.close()
    await server.close()


async def test_new_generation_at_the_same_address_is_met_afresh() -> None:
    events = Recorder()
    links = make_links(events)
    server, old = await start_server(ScriptedEngine())
    links.set_engines((old,))
    await eventually(lambda: len(events.told) == 1)
    await server.close()
    reborn = SessionServer(ScriptedEngine(), "127.0.0.1", old.session_port, SECRET, "e1", 2)
    await reborn.start()
    new = replace(old, generation=2)
    links.set_engines((new,))
    await eventually(lambda: "e1/2" in events.sessions)
    assert list(events.sessions) == ["e1/2"]
    assert events.told == ["connected e1/1", "lost e1/1: closed by the peer", "removed e1", "connected e1/2"]
    await links.close()
    await reborn.close()


async def test_replacement_drops_a_session_that_still_stands() -> None:
    """The old incarnation is frozen or cut off by the registry's word: its socket says nothing."""
    events = Recorder()
    links = make_links(events)
    frozen, old = await start_server(ScriptedEngine())
    reborn, new = await start_server(ScriptedEngine(), generation=2)
    links.set_engines((old,))
    await eventually(lambda: len(events.told) == 1)
    links.set_engines((new,))
    await eventually(lambda: "e1/2" in events.sessions)
    assert "lost e1/1: engine e1 was replaced by generation 2" in events.told
    await links.close()
    await frozen.close()
    await reborn.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": EngineState.UNHEALTHY, "reason": "no step for 5 s"}, "engine e1 is unhealthy: no step for 5 s"),
        ({"state": EngineState.STARTING}, "engine e1 is starting"),
        (None, "engine e1 left the cluster"),
    ],
)
async def test_unfit_engine_is_dropped_with_the_reason(changes: dict[str, object] | None, told: str) -> None:
    events = Recorder()
    links = make_links(events)
    server, info = await start_server(ScriptedEngine())
    links.set_engines((info,))
    await eventually(lambda: len(events.told) == 1)
    links.set_engines(() if changes is None else (replace(info, **changes),))  # type: ignore[arg-type]
    await eventually(lambda: f"lost e1/1: {told}" in events.told)
    links.set_engines((info,))
    await eventually(lambda: "e1/1" in events.sessions)
    await links.close()
    await server.close()


async def test_change_of_role_keeps_the_session() -> None:
    events = Recorder()
    links = make_links(events)
    server, info = await start_server(ScriptedEngine())
    links.set_engines((info,))
    await eventually(lambda: len(events.told) == 1)
    session = events.sessions["e1/1"]
    switched = replace(info, role=Role.PREFILL, state=EngineState.DRAINING)
    links.set_engines((switched,))
    assert session.connected
    assert events.told == ["connected e1/1", "changed e1 draining"]
    await links.close()
    await server.close()


async def test_wrong_secret_never_connects_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    links = make_links(Recorder(), secret=b"other")
    server, info = await start_server(ScriptedEngine())
    links.set_engines((info,))
    await eventually(lambda: "engine e1: the cluster secrets differ" in caplog.text)
    assert server.session_ids == ()
    await links.close()
    await server.close()


async def test_closing_flushes_the_last_aborts_and_leaves_no_task() -> None:
    events, engine = Recorder(), ScriptedEngine()
    links = make_links(events)
    server, info = await start_server(engine)
    links.set_engines((info,))
    await eventually(lambda: "e1/1" in events.sessions)
    session = events.sessions["e1/1"]
    for number in range(1000):
        session.abort(f"r{number}")
    await links.close()
    await eventually(lambda: len(engine.lost) == 1)
    assert len(engine.aborts) == 1000
    await server.close()
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("link-")] == []


async def test_two_ingresses_on_one_engine_do_not_mix() -> None:
    """Two replicas may draw the same request id: each gets its own tokens."""
    async with cluster(0, 0, hybrid=1, client_config=ClientConfig()) as c:
        other_events = Recorder()
        other = make_links(other_events)
        other.set_engines((c["h0"].info,))
        await eventually(lambda: "h0/1" in other_events.sessions)
        request = make_request(max_tokens=1)
        stream = Stream(c.client, request)
        await c["h0"].next_submit()
        mine, theirs = c["h0"].server.session_ids
        assert c["h0"].engine.submits[0][0] == mine
        c["h0"].server.publish(theirs, [TokenOutput("r1", 0, 0, 0, 666)], EngineLoad())
        await eventually(lambda: len(other_events.outputs) == 1)
        assert stream.outputs == []
        c["h0"].server.publish(mine, [TokenOutput("r1", 0, 0, 0, 5)], EngineLoad())
        await eventually(lambda: len(stream.outputs) == 1)
        stream.task.cancel()
        await asyncio.wait([stream.task])
        await other.close()
