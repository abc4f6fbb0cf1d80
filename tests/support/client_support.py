"""A cluster of scripted engines behind real session servers, and a client over it: only what a test says happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from kvbaton.cluster.client.client import ClientConfig, ClusterClient
from kvbaton.cluster.session.server import SessionServer
from kvbaton.cluster.store.registry import Membership, encode_entry
from kvbaton.cluster.store.store import MemoryStore
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import FinishReason, Request, TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, Role
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router
from support.session_support import SECRET, ScriptedEngine, start_server, until

LOAD = EngineLoad(free_blocks=1000)
NO_LOCAL_PREFILL = RouterConfig(local_prefill_max_tokens=0)


async def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for a state that nothing announces; a `TimeoutError` fails the test."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def token_at(sample: int, index: int) -> int:
    """The token that every engine draws there: the scripted engines share their randomness like real ones."""
    return 1000 * (sample + 1) + index


@dataclass
class Node:
    """One engine: script, server, registry entry."""

    engine: ScriptedEngine
    server: SessionServer
    info: EngineInfo

    async def next_submit(self, number: int = 1) -> Submit:
        """The `number`-th request that this engine has ever received."""
        await until(self.engine.changed, lambda: len(self.engine.submits) >= number)
        return self.engine.submits[number - 1][1]

    async def aborted(self, number: int = 1) -> tuple[str, int | None]:
        """The `number`-th abort that this engine has ever received."""
        await until(self.engine.changed, lambda: len(self.engine.aborts) >= number)
        return self.engine.aborts[number - 1][1:]

    def send(self, *outputs: TokenOutput) -> None:
        """One step for the (only) ingress."""
        self.server.publish(self.server.session_ids[-1], list(outputs), LOAD)

    def tokens(self, request: Request, indices: Sequence[int], last: int | None = None) -> None:
        """One step with these tokens of each sample of a request; `last` ends it."""
        self.send(
            *(token(request, sample, index, index == last) for index in indices for sample in request.sample_indices)
        )

    async def kill(self) -> None:
        await self.server.close()


def token(request: Request, sample: int, index: int, last: bool = False) -> TokenOutput:
    finish = FinishReason.LENGTH if last else None
    first = index == len(request.emitted)
    return TokenOutput(
        request.request_id,
        request.epoch,
        sample,
        index,
        token_at(sample, index),
        finish=finish,
        cached_tokens=16 if first else None,
    )


def failure(request: Request, sample: int, message: str) -> TokenOutput:
    return TokenOutput(request.request_id, request.epoch, sample, 0, None, finish=FinishReason.ERROR, error=message)


class Cluster:
    """Nodes, their list, and one client."""

    def __init__(self, client_config: ClientConfig | None, router_config: RouterConfig) -> None:
        self.now = 0.0
        self.store = MemoryStore(lambda: self.now)
        self.membership = Membership(self.store, clock=lambda: self.now)
        self.router = Router(router_config, lambda: self.now, random.Random(0))
        self.client = ClusterClient(self.membership, self.router, SECRET, "ingress-1", client_config)
        self.nodes: dict[str, Node] = {}
        self._beat = 0

    def __getitem__(self, engine_id: str) -> Node:
        return self.nodes[engine_id]

    async def add(self, engine_id: str, role: Role, generation: int = 1) -> Node:
        engine = ScriptedEngine()
        server, info = await start_server(engine, engine_id=engine_id, generation=generation)
        node = Node(engine, server, replace(info, role=role))
        self.nodes[engine_id] = node
        await self.list(node.info)
        await eventually(lambda: self._reached(node.info))
        return node

    def _reached(self, info: EngineInfo) -> bool:
        view = self.router.view(info.engine_id)
        return view is not None and view.info.generation == info.generation

    async def split(self, *engine_ids: str) -> tuple[Node, Node]:
        """(the one of two engines that has got the first request, the other)."""
        one, two = (self.nodes[engine_id] for engine_id in engine_ids)
        await eventually(lambda: bool(one.engine.submits or two.engine.submits))
        return (one, two) if one.engine.submits else (two, one)

    async def list(self, info: EngineInfo) -> None:
        """Put (or change) an engine's registry entry and let the client see it."""
        self._beat += 1
        await self.store.put(f"engines/{info.engine_id}/{info.generation}", encode_entry(info, self._beat))
        await self.membership.look()

    async def close(self) -> None:
        await self.client.close()
        for node in self.nodes.values():
            await node.server.close()

    def nothing_left(self) -> None:
        """After a test: no request is in flight, and every booking was released."""
        assert self.client.in_flight == 0
        assert len(self.client.attempts) == 0
        for info in self.router.engines:
            view = self.router.view(info.engine_id)
            assert view is not None
            assert (view.own_prefill_tokens, view.own_requests, view.own_context_tokens, view.own_legs) == (0, 0, 0, 0)


@asynccontextmanager
async def cluster(
    prefill: int = 1,
    decode: int = 1,
    hybrid: int = 0,
    client_config: ClientConfig | None = None,
    router_config: RouterConfig = NO_LOCAL_PREFILL,
) -> AsyncIterator[Cluster]:
    """A running cluster of engines p0.., d0.., h0..; checks at the end that nothing was left behind."""
    made = Cluster(client_config, router_config)
    await made.client.start()
    try:
        for role, letter, count in (
            (Role.PREFILL, "p", prefill),
            (Role.DECODE, "d", decode),
            (Role.HYBRID, "h", hybrid),
        ):
            for number in range(count):
                await made.add(f"{letter}{number}", role)
        yield made
        made.nothing_left()
    finally:
        await made.close()


class Stream:
    """Reads `generate` in the background and keeps what came."""

    def __init__(self, client: ClusterClient, request: Request) -> None:
        self.outputs: list[TokenOutput] = []
        self.batches = 0
        self.changed = asyncio.Event()
        self.generator = client.generate(request)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for batch in self.generator:
            self.outputs += batch
            self.batches += 1
            self.changed.set()

    async def end(self) -> None:
        """Wait for the end; raises what the stream raised."""
        async with asyncio.timeout(10):
            await self.task

    async def has(self, count: int) -> None:
        await until(self.changed, lambda: len(self.outputs) >= count)

    def of(self, sample: int = 0) -> list[tuple[int, int | None]]:
        return [(output.index, output.token_id) for output in self.outputs if output.sample == sample]


def whole(sample: int, count: int, start: int = 0) -> list[tuple[int, int]]:
    """What a client must have seen of a sample: each index once, in order, with its token."""
    return [(index, token_at(sample, index)) for index in range(start, start + count)]


def legs(*nodes: Node) -> list[LegKind]:
    return [submit.kind for node in nodes for _, submit in node.engine.submits]
