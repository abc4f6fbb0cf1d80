"""A Redis of the operator's own that goes away and comes back while requests run: no stream or member is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from kvbaton.cluster.store.registry import TTL_S, Membership, decode_entry
from kvbaton.cluster.store.store import StoreUnavailable
from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.request import Request
from kvbaton.router.engine_info import Role
from support.engine_process import EngineOptions
from support.external_valkey import ExternalValkey
from support.fault_cells import ALWAYS_SPLIT, DECODE, PREFILL, request
from support.live_cluster import LiveCluster, Stream, until, until_told
from support.oracle import TinyModels

pytestmark = [pytest.mark.ucx, pytest.mark.redis]

LONG = request("long", 100, 600)
SHORT = request("short", 100, 8)
NAMES = itertools.count()


class Scene:
    """A cluster over a server that the test may break, and every list of members that there has been."""

    def __init__(self, cluster: LiveCluster, server: ExternalValkey) -> None:
        self.cluster = cluster
        self.server = server
        self.lists: list[set[str]] = []
        cluster.membership.subscribe(lambda engines: self.lists.append({info.engine_id for info in engines}))

    def stream(self, wanted: Request) -> Stream:
        return self.cluster.stream(replace(wanted, request_id=f"{wanted.request_id}-{next(NAMES)}"))

    async def tokens(self, wanted: Request) -> list[int]:
        return (await self.stream(wanted).end(60))[0]

    async def registered(self) -> dict[str, int]:
        """Engine id -> generation, as the server has it."""
        try:
            entries = await self.cluster.store.entries("engines/")
        except StoreUnavailable:
            return {}
        infos = [decode_entry(entry.value)[0] for entry in entries]
        return {info.engine_id: info.generation for info in infos}

    def known_blocks(self, wanted: Request) -> int:
        """How many of a prompt's blocks the router believes that the prefill engine has."""
        return self.cluster.router.index.match(PREFILL, block_hashes(list(wanted.prompt), 16), now=1e9)


@asynccontextmanager
async def scene(model: Path) -> AsyncIterator[Scene]:
    server = ExternalValkey()
    options = {Role.PREFILL: EngineOptions(), Role.DECODE: EngineOptions()}
    cluster = LiveCluster(model, options, {Role.PREFILL: 1, Role.DECODE: 1}, router=ALWAYS_SPLIT, valkey=server)
    await cluster.start()
    try:
        yield Scene(cluster, server)
        await cluster.seconds_until_free(10.0)
    finally:
        await cluster.stop()


@pytest.mark.parametrize("keep_data", [True, False], ids=["with-its-data", "empty"])
async def test_a_killed_server_costs_nothing(tiny_model: TinyModels, keep_data: bool) -> None:
    async with scene(tiny_model("llama")) as s:
        expected, expected_long = await s.tokens(SHORT), await s.tokens(LONG)
        await until(lambda: s.known_blocks(SHORT) == 6, "the router knows the prompt's blocks")
        running = [s.stream(LONG) for _ in range(3)]
        await until(lambda: all(stream.times for stream in running), "streams run")
        await asyncio.to_thread(s.server.kill)
        assert await s.tokens(SHORT) == expected, "new requests are placed with the last known members"
        await until(lambda: s.cluster.membership.store_error is not None, "the outage is noticed")
        with pytest.raises(StoreUnavailable):
            await Membership(s.cluster.store).start()  # an ingress that starts now says why it cannot
        assert await s.tokens(SHORT) == expected
        await asyncio.to_thread(s.server.start, keep_data)
        assert [(await stream.end(60))[0] for stream in running] == [expected_long] * 3
        await until(lambda: s.cluster.membership.store_error is None, "the server is back")
        back = {PREFILL: 1, DECODE: 1}

        async def all_back() -> bool:
            return await s.registered() == back

        await until_told(all_back, "each engine has written itself again")
        await asyncio.sleep(1.5 * TTL_S)  # whoever was not heard again would be dropped by now
        assert await all_back()
        assert s.lists == [{PREFILL, DECODE}], "nobody left the list at any moment"
        assert s.known_blocks(SHORT) == 6
        assert await s.tokens(SHORT) == expected
        other = request("other", 70, 8)
        await s.tokens(other)
        await until(lambda: s.known_blocks(other) == 4, "prefixes are followed again")
        assert s.cluster.client.counters.resumed == 0


async def test_a_server_that_hangs_costs_no_engine(tiny_model: TinyModels) -> None:
    """Guards against engines dropped because their entries expired in a server that neither answered nor failed."""
    async with scene(tiny_model("llama")) as s:
        expected = await s.tokens(SHORT)
        for seconds in (TTL_S + 0.6, 2 * TTL_S):
            s.server.freeze()
            assert await s.tokens(SHORT) == expected
            await asyncio.sleep(seconds)
            s.server.thaw()
            await asyncio.sleep(1.5 * TTL_S)
            assert await s.tokens(SHORT) == expected
        assert s.lists == [{PREFILL, DECODE}]
        assert s.cluster.client.counters.resumed == 0
