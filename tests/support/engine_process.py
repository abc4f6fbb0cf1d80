"""An `EngineHost` in a process of its own, without Ray: what tests of two real engines over real UCX run on.

Processes fork from a server that has imported everything, so that one starts in a fraction of a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from kvbaton.cluster.host import engine_host
from kvbaton.cluster.host.engine_host import EngineHost, EngineHostSpec, EngineStats
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.store import MemoryStore
from kvbaton.engine.batch import Pending, ScheduledRow
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.kv.block_owners import BlockAudit
from kvbaton.engine.model.loader import LoadedModel
from kvbaton.kvtransfer.config import TransferConfig
from kvbaton.router.engine_info import EngineInfo, EngineState, Role

SECRET = b"a test cluster's secret"
START_S = 60.0
_PRELOAD = ["kvbaton.cluster.host.engine_host", "kvbaton.cluster.client.client", "kvbaton.cluster.store.redis_store"]


@dataclass(frozen=True)
class EngineOptions:
    """What tests vary."""

    kv_memory_bytes: int = 64 << 20
    max_tokens_per_step: int = 512
    prefill_chunk_tokens: int | Literal["auto"] = 64
    prefix_cache: bool = True
    lease_s: float = 10.0
    block_size: int = 16
    device: str = "cpu"
    step_limit_s: float = 60.0
    pipelined: str = "auto"
    quantization: str = "none"
    dtype: str = "float32"


def host_spec(engine_id: str, role: Role, model: Path, options: EngineOptions, generation: int = 1) -> EngineHostSpec:
    cache = CacheConfig(options.block_size, options.kv_memory_bytes, prefix_cache=options.prefix_cache)
    batch = BatchConfig(options.max_tokens_per_step, options.prefill_chunk_tokens)
    engine = EngineConfig(
        model,
        options.device,
        dtype=options.dtype,
        threads=1,
        cache=cache,
        batch=batch,
        quantization=options.quantization,
        pipelined=options.pipelined,
    )
    transfer = TransferConfig(lease_s=options.lease_s)
    return EngineHostSpec(engine_id, generation, role, engine, options.step_limit_s, SECRET, transfer=transfer)


class EngineProcess:
    """Start with `start`, ask with `stats`, end with `stop`, `kill` or `freeze`."""

    def __init__(self, spec: EngineHostSpec, store_url: str | None = None) -> None:
        """With `store_url` it registers there, else nowhere that others see."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._pipe, child = context.Pipe()
        self._lock = threading.Lock()
        self._process = context.Process(target=_main, args=(child, spec, store_url), daemon=True)
        self.spec = spec
        self.info: EngineInfo | None = None
        self._process.start()
        child.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def start(self) -> EngineInfo:
        """Wait until the engine is ready."""
        self.info = self._receive(START_S)
        assert self.info is not None
        return self.info

    def stats(self) -> EngineStats:
        stats: EngineStats = self._ask("stats")
        return stats

    def audit(self) -> BlockAudit:
        """Every block by its owner, counted between two steps."""
        audit: BlockAudit = self._ask("audit")
        return audit

    def slow_down(self, step_s: float) -> None:
        """Every forward pass takes this much longer; 0 also ends a wait in progress."""
        self._ask(("slow", step_s))

    def cut(self, what: str) -> None:
        """Shut every connection of its "session" or "kv" plane from inside."""
        self._ask(("cut", what))

    def announce(self, state: EngineState) -> None:
        """Register as being in another state."""
        self._ask(("announce", state))

    def blocks_of(self, tokens: list[int]) -> dict[int, str]:
        """Digest of each cached block of a prompt, by position: what the pool really holds."""
        found: dict[int, str] = self._ask(("blocks", tokens))
        return found

    def freeze(self, seconds: float | None = None) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """End it in order; with force if it does not."""
        if self._process.is_alive():
            self._pipe.send("stop")
            self._process.join(20.0)
        if self._process.is_alive():
            self.kill()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def _ask(self, question: Any) -> Any:
        with self._lock:  # whoever asks gets his own answer
            self._pipe.send(question)
            return self._receive(20.0)

    def _receive(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"engine {self.spec.engine_id} says nothing for {timeout_s} s")
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


class SlowEngine(Engine):
    """An engine with a pause before each forward pass."""

    def __init__(self, config: EngineConfig, model: LoadedModel, device: torch.device) -> None:
        super().__init__(config, model, device)
        self._pause_s = 0.0
        self._changed = threading.Event()

    def pause(self, seconds: float) -> None:
        self._pause_s = seconds
        self._changed.set()

    def launch(self, rows: list[ScheduledRow]) -> Pending:
        if self._pause_s:
            self._changed.clear()
            self._changed.wait(self._pause_s)
        return super().launch(rows)


def _main(pipe: Connection, spec: EngineHostSpec, store_url: str | None) -> None:
    asyncio.run(_serve(pipe, spec, store_url))


async def _serve(pipe: Connection, spec: EngineHostSpec, store_url: str | None) -> None:
    store = MemoryStore() if store_url is None else await RedisStore.open(store_url)
    engine_host.Engine = SlowEngine  # type: ignore[misc,attr-defined]
    host = EngineHost(spec, store)
    try:
        pipe.send(await host.start())
    except Exception as error:
        pipe.send(error)
        return
    loop = asyncio.get_running_loop()
    questions: asyncio.Queue[Any] = asyncio.Queue()

    def readable() -> None:
        try:
            questions.put_nowait(pipe.recv())
        except EOFError:  # the test process is gone
            questions.put_nowait("stop")
            loop.remove_reader(pipe.fileno())

    loop.add_reader(pipe.fileno(), readable)
    while (question := await questions.get()) != "stop":
        pipe.send(await _answer(host, question))
    loop.remove_reader(pipe.fileno())
    await host.stop()
    await store.close()


async def _answer(host: EngineHost, question: Any) -> Any:
    if question == "stats":
        return await host.stats()
    if question == "audit":
        return await host.audit()
    kind, value = question
    parts = _parts(host)
    if kind == "blocks":
        return _digests(host, value)
    if kind == "slow":
        parts.worker.engine.pause(value)
    elif kind == "announce":
        await parts.registration.update(replace(parts.registration.info, state=value))
    elif kind == "cut":
        _cut(host, value)
    else:
        raise ValueError(f"what is {question!r}?")
    return None


def _parts(host: EngineHost) -> Any:
    assert host._parts is not None
    return host._parts


def _cut(host: EngineHost, what: str) -> None:
    """As a network does: the sockets end, and nobody here has asked for it."""
    if what == "session":
        sockets = [s.connection._transport.get_extra_info("socket") for s in _parts(host).sessions._sessions.values()]
    else:
        sockets = [s.channel.hello._sock for s in _parts(host).agent._sessions.snapshot()]
    for sock in sockets:
        with contextlib.suppress(OSError):  # closed in this moment, since the peer's end was cut first
            sock.shutdown(socket.SHUT_RDWR)


def _digests(host: EngineHost, tokens: list[int]) -> dict[int, str]:
    import hashlib

    from kvbaton.engine.block_hash import block_hashes

    engine = _parts(host).worker.engine
    hashes = block_hashes(tokens, engine.kv.block_size)
    held = engine.kv.match(hashes)  # the engine is idle when tests ask
    digests = {
        i: hashlib.blake2b(bytes(memoryview(engine.cache.block(block)).cast("B")), digest_size=12).hexdigest()  # type: ignore[attr-defined]
        for i, block in enumerate(held)
    }
    engine.kv.release(held)
    return digests
