"""What a scrape says of the engines: each number under its labels, nothing of engines that cannot be reached."""

from __future__ import annotations

import time
from random import Random

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvbaton.cluster.client.client import ClusterClient
from kvbaton.cluster.ingress.engine_metrics import EngineMetrics
from kvbaton.cluster.store.registry import Membership
from kvbaton.cluster.store.store import MemoryStore
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router

LOAD = EngineLoad(
    waiting_requests=1,
    running_requests=2,
    queued_prefill_tokens=300,
    running_context_tokens=4000,
    free_blocks=50,
    held_blocks=30,
    cached_blocks=20,
    step_s=0.0125,
    sequence_blocks=12,
    hold_blocks=9,
    landing_blocks=6,
    quarantine_blocks=3,
    handoffs_acked=7,
    handoffs_failed=8,
    checksum_failures=9,
)


def engine(engine_id: str, role: Role = Role.DECODE, state: EngineState = EngineState.READY) -> EngineInfo:
    return EngineInfo(
        engine_id, 3, role, state, "h", 1, 2, "m", 4096, 16, 100, prefill_chunk_tokens=256, max_requests=64
    )


class Scrape:
    """A router that reaches some engines of a list, and what the registry tells of them all."""

    def __init__(self, *listed: EngineInfo) -> None:
        self.router = Router(RouterConfig(), time.monotonic, Random(0))
        self.client = ClusterClient(Membership(MemoryStore()), self.router, b"secret", "ingress-0")
        self.registry = CollectorRegistry()
        self.registry.register(EngineMetrics(lambda: listed, self.client))

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"kvbaton_{name}", labels)


async def test_every_number_stands_under_its_labels() -> None:
    scrape = Scrape(engine("e-0"))
    scrape.router.add(engine("e-0"))
    scrape.router.observe("e-0", LOAD)
    of = {"engine": "e-0", "role": "decode"}
    states = {"free": 50, "held": 30, "cached": 20}
    owners = {"free": 50, "cache": 20, "sequence": 12, "hold": 9, "landing": 6, "quarantine": 3}
    assert {state: scrape.value("engine_kv_blocks", **of, state=state) for state in states} == states
    assert {owner: scrape.value("engine_kv_blocks_owned", **of, owner=owner) for owner in owners} == owners
    assert scrape.value("engine_requests", **of, state="waiting") == 1
    assert scrape.value("engine_requests", **of, state="running") == 2
    single = {
        "up": 1,
        "kv_blocks_total": 100,
        "prefill_chunk_tokens": 256,
        "queued_prefill_tokens": 300,
        "running_context_tokens": 4000,
        "step_seconds": 0.0125,
        "generation": 3,
        "handoffs_completed_total": 7,
        "handoffs_failed_total": 8,
        "kv_checksum_failures_total": 9,
    }
    assert {name: scrape.value(f"engine_{name}", **of) for name in single} == single


async def test_an_engine_without_a_session_is_down_and_has_no_numbers() -> None:
    """Guards against zeros that look like measurements."""
    draining = engine("drains", state=EngineState.DRAINING)
    scrape = Scrape(engine("reached"), draining, engine("lost", Role.PREFILL))
    scrape.router.add(engine("reached"))
    scrape.router.add(draining)
    assert scrape.value("engine_up", engine="reached", role="decode") == 1
    assert scrape.value("engine_up", engine="drains", role="decode") == 0
    assert scrape.value("engine_up", engine="lost", role="prefill") == 0
    assert scrape.value("engine_generation", engine="drains", role="decode") == 3
    assert scrape.value("engine_generation", engine="lost", role="prefill") is None


async def test_a_session_whose_first_frame_has_not_come_shows_an_empty_pool() -> None:
    scrape = Scrape(engine("e-0"))
    scrape.router.add(engine("e-0"))
    assert scrape.value("engine_kv_blocks", engine="e-0", role="decode", state="free") == 100
    assert scrape.value("engine_requests", engine="e-0", role="decode", state="running") == 0


@pytest.mark.parametrize("name", ['a"b', "back\\slash", "two\nlines", "{x}", "é"])
async def test_any_engine_id_survives_the_text_form(name: str) -> None:
    """Guards against an id that breaks its line, and with it the whole scrape."""
    scrape = Scrape(engine(name))
    families = text_string_to_metric_families(generate_latest(scrape.registry).decode())
    labels = [sample.labels for family in families for sample in family.samples if sample.name == "kvbaton_engine_up"]
    assert labels == [{"engine": name, "role": "decode"}]


async def test_what_became_of_requests_is_counted() -> None:
    scrape = Scrape()
    scrape.client.counters.resumed += 5
    assert scrape.value("requests_resumed_total") == 5
    assert scrape.value("requests_migrations_failed_total") == 0
    assert scrape.value("requests_in_flight") == 0
