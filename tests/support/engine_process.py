"""An `EngineHost` in a process of its own, without Ray: what tests of two real engines over real UCX run on."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvbaton.cluster.engine_host import EngineHost, EngineHostSettings, EngineStats
from kvbaton.cluster.store import MemoryStore
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.kvtransfer.settings import TransferSettings
from kvbaton.router.engine_info import EngineInfo, Role

SECRET = b"a test cluster's secret"
START_S = 60.0


@dataclass(frozen=True)
class EngineOptions:
    """What tests vary."""

    kv_memory_bytes: int = 64 << 20
    max_tokens_per_step: int = 512
    prefill_chunk_tokens: int = 64
    prefix_cache: bool = True
    lease_s: float = 10.0
    block_size: int = 16


def host_settings(
    engine_id: str, role: Role, model: Path, options: EngineOptions, generation: int = 1
) -> EngineHostSettings:
    cache = CacheConfig(options.block_size, options.kv_memory_bytes, prefix_cache=options.prefix_cache)
    batch = BatchConfig(options.max_tokens_per_step, options.prefill_chunk_tokens)
    engine = EngineConfig(model, dtype="float32", threads=1, cache=cache, batch=batch)
    transfer = TransferSettings(lease_s=options.lease_s)
    return EngineHostSettings(engine_id, generation, role, engine, SECRET, transfer=transfer)


class EngineProcess:
    """Start with `start`, ask with `stats`, end with `stop`, `kill` or `freeze`."""

    def __init__(self, settings: EngineHostSettings) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_main, args=(child, settings), daemon=True)
        self.settings = settings
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
        self._pipe.send("stats")
        stats: EngineStats = self._receive(20.0)
        return stats

    def blocks_of(self, tokens: list[int]) -> dict[int, str]:
        """Digest of each cached block of a prompt, by position: what the pool really holds."""
        self._pipe.send(("blocks", tokens))
        found: dict[int, str] = self._receive(20.0)
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

    def _receive(self, timeout_s: float) -> Any:
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"engine {self.settings.engine_id} says nothing for {timeout_s} s")
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _main(pipe: Connection, settings: EngineHostSettings) -> None:
    asyncio.run(_serve(pipe, settings))


async def _serve(pipe: Connection, settings: EngineHostSettings) -> None:
    host = EngineHost(settings, MemoryStore())
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
        if question == "stats":
            pipe.send(await host.stats())
        else:
            pipe.send(_digests(host, question[1]))
    loop.remove_reader(pipe.fileno())
    await host.stop()


def _digests(host: EngineHost, tokens: list[int]) -> dict[int, str]:
    import hashlib

    from kvbaton.engine.block_hash import block_hashes

    parts = host._parts
    assert parts is not None
    engine = parts.worker._engine
    hashes = block_hashes(tokens, engine.kv.block_size)
    held = engine.kv.match(hashes)  # the engine is idle when tests ask
    digests = {
        i: hashlib.blake2b(bytes(memoryview(engine.cache.block(block)).cast("B")), digest_size=12).hexdigest()  # type: ignore[attr-defined]
        for i, block in enumerate(held)
    }
    engine.kv.release(held)
    return digests
