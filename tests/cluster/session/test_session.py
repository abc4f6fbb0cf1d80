"""Guards the session plane on real sockets: handshake, delivery, loss on both ends, slow readers, hostile peers."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbaton.cluster.session.client import SessionClient, SessionLost
from kvbaton.cluster.session.connection import SessionLimits
from kvbaton.cluster.session.handshake import EngineHandshake, IngressHandshake
from kvbaton.cluster.session.messages import HelloMessage, ProofMessage
from kvbaton.cluster.session.server import SessionServer, SubmitRefused
from kvbaton.cluster.session.wire import HEADER, PROTOCOL_VERSION, Encoder, FrameReader, kind_and_fields
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import FinishReason, TokenOutput
from kvbaton.kvtransfer.handshake import HandshakeRefused
from kvbaton.kvtransfer.messages import PeerAddress
from kvbaton.router.engine_info import EngineInfo, EngineLoad
from support.session_support import SECRET, Listener, ScriptedEngine, make_info, make_request, start_server, until

LOAD = EngineLoad(waiting_requests=3, free_blocks=9, step_s=0.5)


@asynccontextmanager
async def serving(
    engine: ScriptedEngine, limits: SessionLimits | None = None
) -> AsyncIterator[tuple[SessionServer, EngineInfo]]:
    server, info = await start_server(engine, limits)
    try:
        yield server, info
    finally:
        await server.close()


async def connect(info: EngineInfo, listener: Listener, secret: bytes = SECRET) -> SessionClient:
    client = SessionClient(info, secret, "ingress-1", listener)
    await client.connect()
    return client


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        return await reader.read(-1)


async def test_submit_tokens_abort_and_load_travel_both_ways() -> None:
    engine, listener = ScriptedEngine(), Listener()
    async with serving(engine) as (server, info):
        server.publish_load(LOAD)
        client = SessionClient(info, SECRET, "ingress-1", listener)
        assert await client.connect() == LOAD
        submit = Submit(make_request(prompt_tokens=100_000), LegKind.PREFILL, PeerAddress("d1", 2, "10.0.0.9", 77))
        client.submit(submit)
        client.abort("r1", 0)
        client.abort("r1")
        await until(engine.changed, lambda: len(engine.aborts) == 2)
        (session_id,) = server.session_ids
        assert engine.submits == [(session_id, submit)]
        assert engine.aborts == [(session_id, "r1", 0), (session_id, "r1", None)]
        outputs = [TokenOutput("r1", 0, 0, i, 40 + i) for i in range(3)]
        server.publish(session_id, outputs, LOAD)
        await until(listener.changed, lambda: bool(listener.frames))
        assert (listener.outputs, listener.loads, listener.frames) == (outputs, [LOAD], [3])
        await client.close()
        await until(engine.changed, lambda: bool(engine.lost))
        assert engine.lost == [session_id]
        assert listener.lost_reasons == ["closed by the ingress"]


async def test_each_ingress_gets_its_own_tokens_and_loss() -> None:
    engine, first, second = ScriptedEngine(), Listener(), Listener()
    async with serving(engine) as (server, info):
        one, two = await connect(info, first), await connect(info, second)
        id_one, id_two = server.session_ids
        server.publish(id_two, [TokenOutput("b", 0, 0, 0, 2)], LOAD)
        server.publish(id_one, [TokenOutput("a", 0, 0, 0, 1)], LOAD)
        await until(first.changed, lambda: bool(first.outputs))
        await until(second.changed, lambda: bool(second.outputs))
        assert [o.request_id for o in first.outputs] == ["a"]
        assert [o.request_id for o in second.outputs] == ["b"]
        one.drop("test")
        await until(engine.changed, lambda: bool(engine.lost))
        assert engine.lost == [id_one]
        assert server.session_ids == (id_two,)
        server.publish(id_one, [TokenOutput("a", 0, 0, 1, 1)], LOAD)  # a late step for the lost one harms nobody
        await two.close()


async def test_server_close_ends_clients_after_the_last_token() -> None:
    engine, listener = ScriptedEngine(), Listener()
    async with serving(engine) as (server, info):
        client = await connect(info, listener)
        server.publish(server.session_ids[0], [TokenOutput("r", 0, 0, 0, 1)], LOAD)
        await server.close()
        await until(listener.changed, lambda: bool(listener.lost_reasons))
        assert len(listener.outputs) == 1
        assert len(engine.lost) == 1
        assert not client.connected
        with pytest.raises(SessionLost, match="no session"):
            client.submit(Submit(make_request(), LegKind.LOCAL))


async def test_wrong_secret_is_refused_at_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine()
    async with serving(engine) as (server, info):
        with pytest.raises(SessionLost, match="cluster secrets differ"):
            await connect(info, Listener(), secret=b"other")
        reader, writer = await asyncio.open_connection(info.host, info.session_port)
        encoder = Encoder()
        writer.write(
            encoder.message(HelloMessage(PROTOCOL_VERSION, "impostor", b"n" * 32))
            + encoder.message(ProofMessage(b"p" * 32))
        )
        frames = FrameReader(1 << 20).feed(await read_all(reader))
        assert kind_and_fields(frames[-1])[1] == ["the cluster secrets differ"]
        writer.close()
        assert server.session_ids == ()
        assert engine.lost == []
    refusals = [r for r in caplog.records if r.levelno == logging.WARNING and "impostor" not in r.message]
    assert len(refusals) == 2  # one line a connection


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": 2}, "expected engine e1 generation 2, found e1 generation 1"),
        ({"engine_id": "e9"}, "expected engine e9 generation 1, found e1"),
    ],
)
async def test_another_engine_at_the_address_is_refused(changes: dict[str, object], message: str) -> None:
    """A restarted engine on the old port must not be taken for the one whose requests are known."""
    async with serving(ScriptedEngine()) as (_, info):
        wrong = make_info(**({"port": info.session_port} | changes))  # type: ignore[arg-type]
        with pytest.raises(SessionLost, match=message):
            await connect(wrong, Listener())


def test_a_recorded_or_reflected_proof_is_worthless() -> None:
    encoder = Encoder()
    engine = EngineHandshake(SECRET, "e1", 1)
    ingress = IngressHandshake(SECRET, "i", "e1", 1)
    challenge = engine.receive(ingress.hello(encoder)[HEADER.size :], encoder)
    assert challenge is not None
    proof = ingress.receive(challenge[HEADER.size :], encoder)
    assert proof is not None
    replayed_to = EngineHandshake(SECRET, "e1", 1)
    replayed_to.receive(ingress.hello(encoder)[HEADER.size :], encoder)
    with pytest.raises(HandshakeRefused):
        replayed_to.receive(proof[HEADER.size :], encoder)
    engine_proof = kind_and_fields(challenge[HEADER.size :])[1][-1]
    with pytest.raises(HandshakeRefused):
        engine.receive(encoder.message(ProofMessage(engine_proof))[HEADER.size :], encoder)
    assert not engine.done


async def test_protocol_version_is_checked_by_name() -> None:
    async with serving(ScriptedEngine()) as (_, info):
        reader, writer = await asyncio.open_connection(info.host, info.session_port)
        writer.write(Encoder().message(HelloMessage(99, "new", b"n" * 32)))
        frames = FrameReader(1 << 20).feed(await read_all(reader))
        assert kind_and_fields(frames[0])[1] == [f"session protocol version {PROTOCOL_VERSION} here, 99 there"]
        writer.close()


@pytest.mark.parametrize("tail", [["a", b"n" * 32], [], [7, [["more"]], "fields", None]])
def test_each_end_refuses_another_version_by_name_whatever_else_that_says(tail: list[object]) -> None:
    why = f"session protocol version {PROTOCOL_VERSION} here, 4 there"
    with pytest.raises(HandshakeRefused, match=why):
        EngineHandshake(SECRET, "e1", 1).receive(msgpack.packb([0, 4, *tail]), Encoder())
    with pytest.raises(HandshakeRefused, match=why):
        IngressHandshake(SECRET, "i", "e1", 1).receive(msgpack.packb([1, 4, *tail]), Encoder())


def test_an_engine_of_an_older_version_is_heard_when_it_refuses() -> None:
    """The kind and the shape of REFUSED are the same in every version."""
    with pytest.raises(HandshakeRefused, match="version 4 here, 5 there"):
        IngressHandshake(SECRET, "i", "e1", 1).receive(msgpack.packb([4, "version 4 here, 5 there"]), Encoder())


async def test_oversized_frame_before_the_proof_is_cut_at_its_header() -> None:
    """An unknown peer must not make the engine hold bytes for it."""
    async with serving(ScriptedEngine()) as (server, info):
        reader, writer = await asyncio.open_connection(info.host, info.session_port)
        writer.write(HEADER.pack(4096))
        assert await read_all(reader) == b""
        writer.close()
        assert server.session_ids == ()


async def test_connection_that_never_speaks_is_dropped() -> None:
    async with serving(ScriptedEngine(), SessionLimits(handshake_s=0.05)) as (_, info):
        reader, writer = await asyncio.open_connection(info.host, info.session_port)
        assert await read_all(reader) == b""
        writer.close()


async def test_connections_are_capped() -> None:
    async with serving(ScriptedEngine(), SessionLimits(max_sessions=1)) as (_, info):
        client = await connect(info, Listener())
        with pytest.raises(SessionLost):
            await connect(info, Listener())
        assert client.connected
        await client.close()


async def test_malformed_frame_costs_only_its_sender(caplog: pytest.LogCaptureFixture) -> None:
    engine, good = ScriptedEngine(), Listener()
    async with serving(engine) as (server, info):
        client = await connect(info, good)
        bad = await connect(info, Listener())
        bad_id = server.session_ids[1]
        assert bad._connection is not None
        bad._connection.send(Encoder().message(ProofMessage(b"")))
        await until(engine.changed, lambda: bool(engine.lost))
        assert engine.lost == [bad_id]
        client.submit(Submit(make_request(), LegKind.LOCAL))
        await until(engine.changed, lambda: bool(engine.submits))
        await client.close()


async def test_slow_reader_is_dropped_at_the_cap_and_memory_stays() -> None:
    """An ingress that stops reading must cost the engine `max_buffered_bytes`, not its memory."""
    engine = ScriptedEngine()
    limits = SessionLimits(max_buffered_bytes=64 << 10)
    async with serving(engine, limits) as (server, info):
        raw = socket.create_connection((info.host, info.session_port))
        await asyncio.to_thread(_handshake_by_hand, raw)
        await until(engine.changed, lambda: bool(server.session_ids))
        (session_id,) = server.session_ids
        outputs = [TokenOutput("r" * 200, 0, 0, i, 1) for i in range(2000)]
        frame_bytes = len(server.encoder.step(outputs, LOAD))
        sent = 0
        while not engine.lost and sent < 200:
            server.publish(session_id, outputs, LOAD)
            sent += 1
            await asyncio.sleep(0)
        assert engine.lost == [session_id]
        # what the kernel's two socket buffers hold, the cap, and the frame that passed it
        assert sent * frame_bytes < (64 << 10) + 2 * frame_bytes + (32 << 20)
        raw.close()


def _handshake_by_hand(raw: socket.socket) -> None:
    encoder, reader = Encoder(), FrameReader(1 << 20)
    ingress = IngressHandshake(SECRET, "slow", "e1", 1)
    raw.sendall(ingress.hello(encoder))
    while ingress.welcome is None:
        for frame in reader.feed(raw.recv(65536)):
            reply = ingress.receive(frame, encoder)
            if reply is not None:
                raw.sendall(reply)


async def test_silent_engine_counts_as_lost() -> None:
    """A frozen process keeps its sockets open: only missing beats tell."""
    listener = Listener()
    async with serving(ScriptedEngine(), SessionLimits(beat_s=60.0)) as (_, info):
        client = SessionClient(info, SECRET, "i", listener, SessionLimits(beat_s=0.02, silence_s=0.1))
        await client.connect()
        await until(listener.changed, lambda: bool(listener.lost_reasons))
        assert listener.lost_reasons[0].startswith("silent for")


async def test_beats_keep_an_idle_session_and_carry_the_load() -> None:
    listener = Listener()
    limits = SessionLimits(beat_s=0.01)
    async with serving(ScriptedEngine(), limits) as (server, info):
        client = SessionClient(info, SECRET, "i", listener, limits)
        await client.connect()
        server.load = LOAD
        await until(listener.changed, lambda: LOAD in listener.loads)
        assert listener.outputs == []
        assert client.connected
        await client.close()


async def test_handler_failure_is_answered_and_the_session_lives() -> None:
    def explode(session_id: int, submit: Submit) -> None:
        if submit.request.request_id == "bad":
            raise RuntimeError("no such pool")

    engine, listener = ScriptedEngine(explode), Listener()
    async with serving(engine) as (_, info):
        client = await connect(info, listener)
        client.submit(Submit(make_request("bad", n=2), LegKind.LOCAL))
        client.submit(Submit(make_request("good"), LegKind.LOCAL))
        await until(engine.changed, lambda: len(engine.submits) == 2)
        await until(listener.changed, lambda: len(listener.outputs) == 2)
        assert [(o.sample, o.finish, o.error) for o in listener.outputs] == [
            (0, FinishReason.ERROR, "RuntimeError: no such pool"),
            (1, FinishReason.ERROR, "RuntimeError: no such pool"),
        ]
        await client.close()


async def test_refusal_on_arrival_is_answered_by_its_reason_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Guards an overload that fills the log with tracebacks."""

    def refuse(session_id: int, submit: Submit) -> None:
        raise SubmitRefused("engine inbox is full (3 requests)")

    engine, listener = ScriptedEngine(refuse), Listener()
    async with serving(engine) as (_, info):
        client = await connect(info, listener)
        client.submit(Submit(make_request("r"), LegKind.LOCAL))
        await until(listener.changed, lambda: bool(listener.outputs))
        assert [(o.finish, o.error) for o in listener.outputs] == [
            (FinishReason.ERROR, "engine inbox is full (3 requests)")
        ]
        assert client.connected
        assert "Traceback" not in caplog.text
        await client.close()


async def test_nobody_listening_is_a_named_error() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        info = make_info(port=held.getsockname()[1])
        with pytest.raises(SessionLost, match=f"engine e1 at 127.0.0.1:{info.session_port}"):
            await connect(info, Listener())


async def test_port_in_use_is_an_os_error() -> None:
    async with serving(ScriptedEngine()) as (_, info):
        second = SessionServer(ScriptedEngine(), "127.0.0.1", info.session_port, SECRET, "e2", 1)
        with pytest.raises(OSError, match="address already in use"):
            await second.start()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=1, max_size=300))
def test_hostile_bytes_are_refused_and_others_served(data: bytes) -> None:
    async def attack() -> None:
        engine = ScriptedEngine()
        async with serving(engine, SessionLimits(handshake_s=0.2)) as (server, info):
            client = await connect(info, Listener())
            reader, writer = await asyncio.open_connection(info.host, info.session_port)
            writer.write(data)
            writer.write_eof()
            await read_all(reader)
            writer.close()
            assert len(server.session_ids) == 1
            client.submit(Submit(make_request(), LegKind.LOCAL))
            await until(engine.changed, lambda: bool(engine.submits))
            await client.close()

    asyncio.run(attack())
