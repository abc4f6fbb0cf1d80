"""The real HTTP application on a real port over a `LocalCluster`: everything but Ray and HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn

from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.metrics import HttpMetrics
from kvbaton.cluster.http.service import ModelCard, Service
from kvbaton.cluster.ingress.engine_metrics import EngineMetrics
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.text.tokenizer import Tokenizer
from support.local_cluster import LocalCluster

MODEL_ID = "tiny"


class QuietServer(uvicorn.Server):
    """Leaves the process's signal handlers alone."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@asynccontextmanager
async def http_endpoint(cluster: LocalCluster, model: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client whose base URL is the running endpoint."""
    config = load_model_config(model)
    metrics = HttpMetrics()
    metrics.registry.register(EngineMetrics(lambda: cluster.membership.engines, cluster.client))
    service = Service(
        client=cluster.client,
        tokenizer=Tokenizer.load(model),
        model=ModelCard(MODEL_ID, config.vocab_size, config.max_position_embeddings, config.eos_token_ids),
        version="test",
        metrics=metrics,
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = QuietServer(uvicorn.Config(create_app(service), log_level="warning", lifespan="off"))
        task = asyncio.create_task(server.serve([sock]))
        await cluster.until(lambda: server.started, "the endpoint listens")
        try:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            await task


async def held_blocks(client: httpx.AsyncClient) -> dict[str, float]:
    """Engine id -> KV blocks held, as `/metrics` tells it."""
    text = (await client.get("/metrics")).text
    return {
        engine: float(value)
        for engine, value in re.findall(r'kvbaton_engine_kv_blocks\{engine="([^"]+)",[^}]*state="held"\} (\S+)', text)
    }
