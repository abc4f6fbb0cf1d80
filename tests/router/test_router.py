"""Guards the router's book: what is placed counts at once, what ends is released, and nothing counts twice."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from kvbaton.engine.block_hash import block_hashes
from kvbaton.engine.request import Request, SamplingParams
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.placement import EngineView, Local, Pair, Refused, RouterConfig, Unavailable
from kvbaton.router.router import Booking, Router
from support.session_support import make_info, make_request


class World:
    """A router on a hand-moved clock."""

    def __init__(self, *infos: EngineInfo, config: RouterConfig | None = None) -> None:
        self.now = 0.0
        self.router = Router(config or RouterConfig(local_prefill_max_tokens=32), lambda: self.now, Random(1))
        for info in infos:
            self.router.add(info)

    def send(self, request: Request) -> Booking:
        placement = self.router.place(request)
        assert isinstance(placement, Pair | Local)
        return self.router.book(request, placement)

    def view(self, engine_id: str) -> EngineView:
        view = self.router.view(engine_id)
        assert view is not None
        return view


def info(engine_id: str, **changes: object) -> EngineInfo:
    role = {"p": Role.PREFILL, "d": Role.DECODE, "h": Role.HYBRID}[engine_id[0]]
    return make_info(engine_id, **({"role": role} | changes))


def prompt(number: int, tokens: int = 320) -> Request:
    return replace(make_request(f"r{number}"), prompt=tuple(range(number * 1000, number * 1000 + tokens)))


def test_own_placements_count_before_the_engine_says_so() -> None:
    """A burst between two frames must spread, not pile up on the engine that was idle at the last frame."""
    world = World(info("p0"), info("p1"), info("d0"), info("d1"))
    bookings = [world.send(prompt(number)) for number in range(4)]
    assert sorted(b.prefill.info.engine_id for b in bookings) == ["p0", "p0", "p1", "p1"]
    assert sorted(b.decode.info.engine_id for b in bookings) == ["d0", "d0", "d1", "d1"]
    assert world.view("p0").own_prefill_tokens == 640
    assert (world.view("d0").own_requests, world.view("d0").own_context_tokens) == (2, 640)


def test_reported_and_own_work_are_not_added_up() -> None:
    world = World(info("h0"))
    world.send(prompt(0))
    world.router.observe("h0", EngineLoad(queued_prefill_tokens=320, running_requests=1, free_blocks=9))
    assert world.view("h0").queued_prefill_tokens == 320
    assert world.view("h0").decoding == 1
    world.router.observe("h0", EngineLoad(queued_prefill_tokens=5000, running_requests=7, waiting_requests=2))
    assert (world.view("h0").queued_prefill_tokens, world.view("h0").decoding) == (5000, 9)  # other ingresses' work


def test_siblings_of_one_prompt_meet_before_the_first_event() -> None:
    world = World(*(info(f"p{n}") for n in range(4)), info("d0"))
    bookings = [world.send(replace(prompt(1), request_id=f"sibling-{n}")) for n in range(5)]
    assert len({b.prefill.info.engine_id for b in bookings}) == 1
    assert [b.prefill_tokens for b in bookings] == [320, 1, 1, 1, 1]
    assert all(isinstance(b.placement, Pair) for b in bookings)  # decode has nothing yet: not computed there again
    world.router.first_token(bookings[0])
    assert isinstance(world.router.place(prompt(1)), Pair), "the prompt is computed, and still at prefill"
    world.router.handed_over(bookings[0])
    assert world.router.place(prompt(1)) == Local(info("d0"), 319)


def test_a_prompt_that_is_never_handed_over_is_not_at_decode() -> None:
    """Guards a request whose answer ends with its first token: sent to decode, the next one would be computed there."""
    world = World(info("p0"), info("d0"))
    booking = world.send(prompt(1))
    world.router.first_token(booking)
    world.router.release(booking)
    world.router.handed_over(booking)
    assert world.router.place(prompt(1)) == Pair(info("p0"), info("d0"), 319, 0)


def test_an_engine_takes_no_more_requests_than_it_says() -> None:
    """Prefill has a request until it is handed over, decode until it ends; a resume is no exception."""
    world = World(info("p0", max_requests=2), info("d0", max_requests=3))
    bookings = [world.send(prompt(n)) for n in range(2)]
    for admit in (True, False):
        refused = world.router.place(prompt(2), admit=admit)
        assert isinstance(refused, Refused)
        assert "2 requests are there" in refused.reason
    world.router.first_token(bookings[0])
    assert isinstance(world.router.place(prompt(2)), Refused), "its KV is not taken yet"
    world.router.handed_over(bookings[0])
    bookings.append(world.send(prompt(2)))
    world.router.handed_over(bookings[1])
    assert isinstance(world.router.place(prompt(3)), Refused), "three are at decode"
    assert world.router.place_migration(320, "p0") is None
    world.router.release(bookings[0])
    bookings.append(world.send(prompt(3)))
    for booking in bookings * 2:
        world.router.handed_over(booking)
        world.router.release(booking)
    assert (world.view("p0").own_legs, world.view("d0").own_legs) == (0, 0)


def test_events_of_the_engines_decide_where_the_prefix_is() -> None:
    world = World(info("p0"), info("p1"), info("d0"))
    request = prompt(3)
    world.router.index.stored("p1", block_hashes(request.prompt, 16))
    placement = world.router.place(request)
    assert isinstance(placement, Pair)
    assert (placement.prefill.engine_id, placement.prefill_cached_tokens) == ("p1", 319)  # the last is always computed


def test_salt_separates_tenants() -> None:
    world = World(info("p0"), info("d0"))
    request = prompt(3)
    world.router.index.stored("p0", block_hashes(request.prompt, 16))
    placement = world.router.place(replace(request, cache_salt="other"))
    assert isinstance(placement, Pair)
    assert placement.prefill_cached_tokens == 0


def test_a_resume_finds_blocks_with_its_generated_tokens() -> None:
    """Placed where it has least to compute; the same tokens as a prompt would not be found there."""
    world = World(info("p0"), info("d0"))
    request = replace(prompt(3), sampling=SamplingParams(max_tokens=400))
    cut = len(request.prompt) - 20
    resume = replace(request, prompt=request.prompt[:cut], emitted=request.prompt[cut:])
    world.router.index.stored("p0", block_hashes(resume.context, 16, num_prompt=cut))
    placed = [world.router.place(wanted) for wanted in (resume, request)]
    assert [p.prefill_cached_tokens for p in placed if isinstance(p, Pair)] == [
        len(request.prompt) - 1,
        cut // 16 * 16,
    ]


def test_block_sizes_may_differ_between_engines() -> None:
    world = World(info("p0", block_size=64), info("d0", block_size=16))
    request = prompt(3)
    world.router.index.stored("p0", block_hashes(request.prompt, 64)[:2])
    world.router.index.stored("d0", block_hashes(request.prompt, 16)[:3])
    placement = world.router.place(request)
    assert isinstance(placement, Pair)
    assert (placement.prefill_cached_tokens, placement.decode_cached_tokens) == (128, 48)


def test_first_token_and_release_take_everything_off_once() -> None:
    world = World(info("p0"), info("d0"))
    booking = world.send(prompt(0))
    world.router.first_token(booking)
    assert world.view("p0").own_prefill_tokens == 0
    assert world.view("d0").own_requests == 1
    world.router.release(booking)
    world.router.release(booking)
    world.router.first_token(booking)
    early = world.send(prompt(1))
    world.router.release(early)
    for name in ("p0", "d0"):
        view = world.view(name)
        assert (view.own_prefill_tokens, view.own_requests, view.own_context_tokens) == (0, 0, 0)


def test_time_to_first_token_teaches_the_rate() -> None:
    world = World(info("p0"), info("d0"))
    first, second = world.send(prompt(0, 1000)), world.send(prompt(1, 1000))
    world.now = 2.0
    world.router.first_token(first)  # 1000 tokens in 2 s: twice the guess
    assert world.view("p0").times.prefill_s_per_token == pytest.approx(0.0012)
    world.now = 2.4
    world.router.first_token(second)  # 2000 tokens, the queue included, in 2.4 s: as predicted
    assert world.view("p0").times.prefill_s_per_token == pytest.approx(0.0012)
    assert world.view("d0").times.prefill_s_per_token == 0.001


def test_steps_without_prefill_teach_the_decode_step() -> None:
    world = World(info("d0"), info("p0"))
    before = world.view("d0").times.decode_step_s
    world.router.observe("d0", EngineLoad(running_requests=1, step_s=0.04, queued_prefill_tokens=100))
    assert world.view("d0").times.decode_step_s == before
    world.router.observe("d0", EngineLoad(running_requests=1, step_s=0.04))
    assert world.view("d0").times.decode_step_s > before
    assert world.view("p0").times.decode_step_s == before


@pytest.mark.parametrize("state", [state for state in EngineState if state is not EngineState.READY])
def test_only_ready_engines_get_requests(state: EngineState) -> None:
    world = World(info("h0", state=state))
    assert world.router.place(prompt(0)) == Unavailable("no engine is ready")
    world.router.add(info("h1"))
    assert world.router.place(prompt(0)) == Local(info("h1"))


def test_prompt_that_fits_no_engine_is_told_so() -> None:
    world = World(info("h0", max_model_len=320))
    assert world.router.place(prompt(0)) == Unavailable("no engine takes 320 tokens")
    assert isinstance(world.router.place(prompt(0, 319)), Local)


def test_unreachable_engine_keeps_its_cache_and_loses_its_book() -> None:
    world = World(info("p0"), info("d0"))
    booking = world.send(prompt(0))
    world.router.index.stored("p0", block_hashes(prompt(0).prompt, 16))
    world.router.unreachable("p0")
    assert world.router.place(prompt(0)) == Local(info("d0"), 0)  # decode serves alone
    world.router.release(booking)
    world.router.add(info("p0"))
    assert world.view("p0").own_prefill_tokens == 0
    assert world.router.index.match("p0", block_hashes(prompt(0).prompt, 16), 1e9) == 20


def test_new_generation_starts_with_an_empty_cache_and_book() -> None:
    world = World(info("h0"))
    booking = world.send(prompt(0))
    world.router.index.stored("h0", block_hashes(prompt(0).prompt, 16))
    world.router.add(info("h0", generation=2))
    assert world.router.place(prompt(0)) == Local(info("h0", generation=2), 0)
    world.router.release(booking)
    assert world.view("h0").own_requests == 0
    with pytest.raises(ValueError, match="engine h0 generation 1 is not reachable"):
        world.router.book(prompt(0), Local(info("h0")))


def test_role_change_keeps_the_engine_and_its_book() -> None:
    world = World(info("p0"), info("d0"))
    booking = world.send(prompt(0))
    world.router.add(replace(info("p0"), role=Role.DECODE))
    assert world.view("p0") is booking.prefill
    assert {type(world.router.place(prompt(n))) for n in range(1, 9)} == {Local}


def test_samples_count_as_sequences_on_decode() -> None:
    world = World(info("p0"), info("d0"))
    request = replace(prompt(0), sample_indices=(0, 1, 2))
    booking = world.send(request)
    assert (world.view("d0").own_requests, world.view("d0").own_context_tokens) == (3, 960)
    world.router.release(booking)


def test_overload_is_refused_unless_the_request_was_admitted_before() -> None:
    world = World(info("h0"), config=RouterConfig(max_queued_prefill_tokens=100))
    world.send(prompt(0))
    assert isinstance(world.router.place(prompt(1)), Refused)
    assert isinstance(world.router.place(prompt(1), admit=False), Local)
    assert isinstance(world.router.place(prompt(1), frozenset({"h0"}), admit=False), Local)
