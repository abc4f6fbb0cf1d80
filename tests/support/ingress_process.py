"""An ingress in a process of its own, made to be killed: a real cluster client, tokens come back through a pipe."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from random import Random

from kvbaton.cluster.client.client import ClusterClient
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.registry import Membership
from kvbaton.engine.request import Request
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router
from support.engine_process import SECRET
from support.live_cluster import until

START_S = 60.0


class IngressProcess:
    """`ready` waits until it has its engines; then `submit` requests, look at `num_tokens`, `kill`."""

    def __init__(self, store_url: str, num_engines: int, router: RouterConfig) -> None:
        context = multiprocessing.get_context("forkserver")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_main, args=(child, store_url, num_engines, router), daemon=True)
        self._process.start()
        child.close()
        self._received: dict[str, int] = {}

    def ready(self) -> None:
        assert self._pipe.poll(START_S), "the ingress has not come up"
        assert self._pipe.recv() == "ready"

    def submit(self, request: Request) -> None:
        self._received[request.request_id] = 0
        self._pipe.send(request)

    def migrate(self, request_id: str, to: str) -> None:
        self._pipe.send((request_id, to))

    def num_tokens(self, request_id: str) -> int:
        """That have arrived so far."""
        while self._pipe.poll(0):
            name, count = self._pipe.recv()
            self._received[name] += count
        return self._received[request_id]

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _main(pipe: Connection, store_url: str, num_engines: int, router: RouterConfig) -> None:
    asyncio.run(_serve(pipe, store_url, num_engines, router))


async def _serve(pipe: Connection, store_url: str, num_engines: int, config: RouterConfig) -> None:
    membership = Membership(await RedisStore.open(store_url))
    await membership.start()
    router = Router(config, time.monotonic, Random(0))
    client = ClusterClient(membership, router, SECRET, "victim-ingress")
    await client.start()
    await until(lambda: len(router.engines) >= num_engines, "every engine is connected")
    pipe.send("ready")
    requests: asyncio.Queue[Request | tuple[str, str] | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def readable() -> None:
        try:
            requests.put_nowait(pipe.recv())
        except EOFError:
            requests.put_nowait(None)
            loop.remove_reader(pipe.fileno())

    loop.add_reader(pipe.fileno(), readable)
    readers = set()
    while (wanted := await requests.get()) is not None:
        if isinstance(wanted, Request):
            readers.add(asyncio.create_task(_read(client, wanted, pipe)))
        else:
            readers.add(asyncio.create_task(_migrate(client, *wanted)))


async def _read(client: ClusterClient, request: Request, pipe: Connection) -> None:
    async for outputs in client.generate(request):
        pipe.send((request.request_id, sum(output.token_id is not None for output in outputs)))


async def _migrate(client: ClusterClient, request_id: str, to: str) -> None:
    await client.migrate(request_id, 0, to)
