"""Guards exact placement decisions of the pure policy: who is chosen, when nobody is, and for how long to wait."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from msgspec import structs

from kvbaton.router.engine_info import EngineLoad, Role
from kvbaton.router.placement import (
    Candidate,
    Decision,
    Demand,
    EngineView,
    Local,
    Pair,
    Refused,
    RouterConfig,
    Unavailable,
    decide,
)
from kvbaton.router.time_model import TimeModel
from support.session_support import make_info

CONFIG = RouterConfig(local_prefill_max_tokens=32, expected_output_tokens=64)
TIMES = TimeModel(prefill_s_per_token=0.001, decode_step_s=0.02, step_per_sequence_s=0.001)
LONG = Demand(context_tokens=1000, max_output_tokens=64, samples=1)
IDLE = EngineLoad(free_blocks=1000)


def engine(
    engine_id: str, cached: int = 0, load: EngineLoad | None = IDLE, avoided: bool = False, chunk: int = 512
) -> Candidate:
    role = {"p": Role.PREFILL, "d": Role.DECODE, "h": Role.HYBRID}[engine_id[0]]
    info = make_info(engine_id, role=role, prefill_chunk_tokens=chunk)
    return Candidate(EngineView(info, TIMES, load), cached, avoided)


def chosen(*candidates: Candidate, demand: Demand = LONG, config: RouterConfig = CONFIG, seed: int = 0) -> str:
    return name(decide(candidates, demand, config, Random(seed)))


def name(decision: Decision) -> str:
    match decision:
        case Pair(prefill, decode):
            return f"{prefill.engine_id}>{decode.engine_id}"
        case Local(engine):
            return engine.engine_id
        case Refused():
            return "refused"
        case Unavailable():
            return "unavailable"


def queued(tokens: int) -> EngineLoad:
    return structs.replace(IDLE, queued_prefill_tokens=tokens)


def running(requests: int) -> EngineLoad:
    return structs.replace(IDLE, running_requests=requests)


def test_pair_of_the_least_queued_prefill_and_the_least_busy_decode() -> None:
    assert chosen(engine("p0", load=queued(10)), engine("p1"), engine("d0", load=running(1)), engine("d1")) == "p1>d1"


def test_cached_prefix_wins_until_the_queue_costs_more() -> None:
    """Stickiness ends by itself: a hot prefix spreads once its engine is busy enough."""
    others = (engine("p1"), engine("d0"))
    assert chosen(engine("p0", cached=512, load=queued(1023)), *others) == "p0>d0"
    assert chosen(engine("p0", cached=512, load=queued(1025)), *others) == "p1>d0"


def test_cache_on_decode_saves_transfer_only_where_it_shortens_the_tail() -> None:
    config = replace(CONFIG, transfer_s_per_token=1e-3)
    assert chosen(engine("p0"), engine("d0", cached=900), engine("d1"), config=config) == "p0>d0"
    assert chosen(engine("p0"), engine("d0", cached=900, load=running(40)), engine("d1"), config=config) == "p0>d1"


@pytest.mark.parametrize(
    ("tokens", "cached", "decision"), [(31, 0, "d0"), (32, 0, "p0>d0"), (1000, 969, "d0"), (1000, 968, "p0>d0")]
)
def test_few_uncached_tokens_are_prefilled_on_decode(tokens: int, cached: int, decision: str) -> None:
    demand = replace(LONG, context_tokens=tokens)
    assert chosen(engine("p0"), engine("d0", cached=cached), demand=demand) == decision


def test_decode_engine_with_the_prefix_competes_with_pairs_of_the_others() -> None:
    """Cached on an overloaded decode engine: a pair elsewhere may still be sooner."""
    assert chosen(engine("p0"), engine("d0", cached=990), engine("d1")) == "d0"
    assert chosen(engine("p0"), engine("d0", cached=990, load=running(200)), engine("d1")) == "p0>d1"


def test_hybrid_runs_both_and_competes_with_pairs() -> None:
    assert chosen(engine("h0")) == "h0"
    assert chosen(engine("h0", cached=64), engine("p0"), engine("d0")) == "h0"
    assert chosen(engine("h0", load=queued(5000)), engine("p0"), engine("d0")) == "p0>d0"


@pytest.mark.parametrize(
    ("engines", "decision"),
    [("p", "p0"), ("d", "d0"), ("dh", {"d0", "h1"}), ("ph", "h1"), ("pd", "p0>d1")],
)
def test_a_missing_role_is_served_by_the_other(engines: str, decision: str | set[str]) -> None:
    candidates = [engine(f"{letter}{number}") for number, letter in enumerate(engines)]
    expected = decision if isinstance(decision, set) else {decision}
    assert {chosen(*candidates, seed=seed) for seed in range(20)} == expected


def test_decode_without_room_for_the_prompt_is_passed_over() -> None:
    full = EngineLoad(free_blocks=10, cached_blocks=10)
    assert chosen(engine("p0"), engine("d0", load=full), engine("d1", load=running(10))) == "p0>d1"
    evictable = EngineLoad(free_blocks=10, cached_blocks=60)
    assert chosen(engine("p0"), engine("d0", load=evictable), engine("d1", load=running(10))) == "p0>d0"


def test_engine_that_has_not_reported_counts_as_empty() -> None:
    assert chosen(engine("p0"), engine("d0", load=None), engine("d1", load=running(1))) == "p0>d0"


def test_idle_twins_share_at_random_and_the_seed_decides() -> None:
    twins = [engine(f"{role}{number}") for role in "pd" for number in range(2)]
    seen = [chosen(*twins, seed=seed) for seed in range(200)]
    assert set(seen) == {"p0>d0", "p0>d1", "p1>d0", "p1>d1"}
    assert all(seen.count(pair) > 25 for pair in set(seen))
    assert seen == [chosen(*twins, seed=seed) for seed in range(200)]


def test_short_answers_weigh_the_decode_step_less() -> None:
    slow_decode = engine("d0", cached=600, load=running(30))
    config = replace(CONFIG, transfer_s_per_token=0.002)
    many, one = replace(LONG, max_output_tokens=64), replace(LONG, max_output_tokens=1)
    assert chosen(engine("p0", chunk=1000), slow_decode, engine("d1"), demand=many, config=config) == "p0>d1"
    assert chosen(engine("p0", chunk=1000), slow_decode, engine("d1"), demand=one, config=config) == "p0>d0"


def test_shorter_chunks_leave_less_to_send_at_the_end() -> None:
    """Of two idle engines the one whose last chunk is shorter has its blocks away earlier."""
    config = replace(CONFIG, transfer_s_per_token=0.002)
    for seed in range(20):
        engines = (engine("p0", chunk=512), engine("p1", chunk=256), engine("d0"))
        assert chosen(*engines, config=config, seed=seed) == "p1>d0"


def test_retry_avoids_the_engines_that_failed_while_there_are_others() -> None:
    retry = replace(LONG, retry=True)
    failed = (engine("p0", avoided=True), engine("d0", avoided=True))
    assert chosen(*failed, engine("p1", load=queued(3000)), engine("d1", load=running(50)), demand=retry) == "p1>d1"
    assert chosen(*failed, engine("p1"), demand=retry) == "p1>d0"
    assert chosen(engine("p0", avoided=True), engine("d0"), demand=retry) == "d0"  # no transfer to fail again
    assert chosen(*failed, demand=retry) == "d0"


def test_no_engine_is_unavailable() -> None:
    assert decide([], LONG, CONFIG, Random(0)) == Unavailable("no engine is ready")


def test_queue_cap_refuses_with_the_time_until_there_is_room() -> None:
    config = replace(CONFIG, max_queued_prefill_tokens=4000)
    decision = decide(
        [engine("p0", load=queued(5000)), engine("p1", load=queued(3500)), engine("d0")], LONG, config, Random(0)
    )
    assert isinstance(decision, Refused)
    assert decision.retry_after_s == pytest.approx(0.5)
    assert decision.reason == "every engine is busy: 3500 prompt tokens are queued on the one that is free first"
    full, open_one = engine("p0", load=queued(5000)), engine("p1", load=queued(3000))
    assert chosen(full, open_one, engine("d0"), config=config) == "p1>d0"


def test_prompt_longer_than_the_cap_is_taken_by_an_empty_queue() -> None:
    config = replace(CONFIG, max_queued_prefill_tokens=500)
    assert chosen(engine("p0"), engine("d0"), config=config) == "p0>d0"
    assert chosen(engine("p0", load=queued(1)), engine("d0"), config=config) == "refused"


def test_waiting_requests_cap_refuses_decode() -> None:
    config = replace(CONFIG, max_waiting_requests=8)
    full = structs.replace(IDLE, waiting_requests=8, running_requests=32)
    decision = decide([engine("p0"), engine("d0", load=full)], LONG, config, Random(0))
    assert isinstance(decision, Refused)
    # one of 32 running ends every other step of 20 + 40 ms
    assert decision.retry_after_s == pytest.approx(2 * 0.060)
    assert chosen(engine("p0"), engine("d0", load=full), engine("d1"), config=config) == "p0>d1"


def test_busy_prefill_is_not_missing() -> None:
    """A long prompt must wait for prefill, not flood the decode engines, when prefill is merely full."""
    config = replace(CONFIG, max_queued_prefill_tokens=4000)
    assert chosen(engine("p0", load=queued(5000)), engine("d0"), config=config) == "refused"


def test_admitted_requests_are_placed_whatever_the_load() -> None:
    config = replace(CONFIG, max_queued_prefill_tokens=10, admission=False)
    assert chosen(engine("p0", load=queued(5000)), engine("d0"), config=config) == "p0>d0"


def test_cached_tokens_are_told_with_the_placement() -> None:
    decision = decide([engine("p0", cached=512), engine("d0", cached=256)], LONG, CONFIG, Random(0))
    assert isinstance(decision, Pair)
    assert (decision.prefill_cached_tokens, decision.decode_cached_tokens) == (512, 256)
