"""Where a request runs: the policy, as pure functions over views of the engines.

Predicted seconds until the first token, plus what the rest is expected to take, plus the compute once more as work:

    pair(p, d)   queue(p) + 2 x compute(p, uncached on p) + transfer tail(p -> d)   + tokens x step(d)
    local(e)     queue(e) + 2 x compute(e, uncached on e)                           + tokens x step(e)

Candidates are each pair and each hybrid engine; and each decode engine on which so little of the prompt is uncached
that a transfer is not worth it, which then takes the place of its pairs. Where a role has no engine left, the other
role serves alone. Equal costs (to `tie_fraction`) are drawn at random, so that idle twins share the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

from annotated_types import Interval

from kvbaton.router.engine_info import EngineInfo, EngineLoad, Role
from kvbaton.router.time_model import TimeModel
from kvbaton.settings import Setting, check


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Limits and guesses of the policy. `max_queued_prefill_tokens` and `max_waiting_requests` are per engine."""

    local_prefill_max_tokens: Annotated[
        int,
        Interval(ge=0, le=1 << 20),
        Setting("router.local_prefill_tokens", "prompts with fewer uncached tokens are prefilled on the decode engine"),
    ] = 32
    max_queued_prefill_tokens: int = 1 << 17
    max_waiting_requests: int = 256
    expected_output_tokens: int = 64  # of a request that allows more
    transfer_s_per_token: float = 5e-6
    work_weight: float = 1.0  # how much a second of compute costs besides the waiting
    no_room_s: float = 1.0  # added for a decode engine without blocks for the prompt
    tie_fraction: float = 1e-6
    prefill_s_per_token: float = 1e-3
    decode_step_s: float = 20e-3
    avoid_s: float = 10.0  # added for an engine that has just failed the request
    admission: bool = True

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Pair:
    """Prefill on one engine, decode on another; the tokens of the prompt that each has cached, as far as known."""

    prefill: EngineInfo
    decode: EngineInfo
    prefill_cached_tokens: int = 0
    decode_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Local:
    """Prefill and decode on one engine, no transfer."""

    engine: EngineInfo
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """Every engine that could take the request has too much queued. `retry_after_s`: when the first has room again."""

    reason: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Unavailable:
    """No engine can take the request at all."""

    reason: str


Placement = Pair | Local
Decision = Pair | Local | Refused | Unavailable


@dataclass(frozen=True, slots=True)
class Demand:
    """A request as the policy sees it: its tokens to prefill, the most it may still generate, and its samples.

    A `retry` also considers prefilling on each decode engine: a transfer has just failed it.
    """

    context_tokens: int
    max_output_tokens: int
    samples: int
    retry: bool = False


@dataclass(slots=True)
class EngineView:
    """What the router believes about one engine: its registry entry, its last numbers, and the router's own work on it.

    The own book counts from the moment of placing, the engine's numbers from its next frame, and those include the own
    work that has arrived. So the larger of the two is taken: never the same work twice, never less than the own.
    `load` is None until the first frame.
    """

    info: EngineInfo
    times: TimeModel
    load: EngineLoad | None = None
    own_prefill_tokens: int = 0  # placed here, first token not seen yet
    own_requests: int = 0  # placed here to decode, not finished
    own_context_tokens: int = 0
    refusing: bool = False  # it has just refused a request for want of room
    own_legs: int = 0  # requests that have this engine do anything, a hand-off included

    @property
    def queued_prefill_tokens(self) -> int:
        reported = 0 if self.load is None else self.load.queued_prefill_tokens
        return max(self.own_prefill_tokens, reported)

    @property
    def decoding(self) -> int:
        """Requests that decode here or wait to."""
        reported = 0 if self.load is None else self.load.running_requests + self.load.waiting_requests
        return max(self.own_requests, reported)

    @property
    def waiting_requests(self) -> int:
        return 0 if self.load is None else self.load.waiting_requests

    @property
    def available_blocks(self) -> int:
        """Blocks that are free or could be: cached ones are evicted on demand."""
        if self.load is None:
            return self.info.num_blocks
        return self.load.free_blocks + self.load.cached_blocks

    @property
    def full(self) -> bool:
        """It would refuse another request: the own ones alone fill it, or those of other ingresses do."""
        return self.refusing or self.own_legs >= self.info.max_requests

    def observe(self, load: EngineLoad) -> None:
        """Take over the numbers of a frame. A step without prompt tokens waiting shows the time of a decode step."""
        self.load = load
        self.refusing = False
        if load.queued_prefill_tokens == 0:
            self.times.observe_step(load.running_requests, load.step_s)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that may take a request, with the leading tokens of the prompt that it has cached. One to be `avoided`
    is taken only where there is no other."""

    view: EngineView
    cached_tokens: int
    avoided: bool = False


@dataclass(frozen=True, slots=True)
class _Option:
    placement: Placement
    cost_s: float


def decide(candidates: Sequence[Candidate], demand: Demand, config: RouterConfig, rng: Random) -> Decision:
    """The cheapest placement, or why there is none. `candidates` can serve: ready, connected, long enough contexts."""
    if not candidates:
        return Unavailable("no engine is ready")
    open_ones = [c for c in candidates if _excess(c, demand, config) is None]
    options = _options(open_ones, demand, config, roles=_roles(candidates))
    if not options:
        return _refusal(candidates, demand, config)
    best = min(option.cost_s for option in options)
    ties = [option.placement for option in options if option.cost_s <= best * (1 + config.tie_fraction)]
    return ties[0] if len(ties) == 1 else rng.choice(ties)


def _roles(candidates: Iterable[Candidate]) -> frozenset[Role]:
    return frozenset(candidate.view.info.role for candidate in candidates)


def _options(
    candidates: Sequence[Candidate], demand: Demand, config: RouterConfig, roles: frozenset[Role]
) -> list[_Option]:
    """`roles` are those there are, full engines included: one that is merely busy is not missing."""
    prefills = [c for c in candidates if c.view.info.role is Role.PREFILL]
    decodes = [c for c in candidates if c.view.info.role is Role.DECODE]
    hybrids = [c for c in candidates if c.view.info.role is Role.HYBRID]
    if Role.PREFILL not in roles:
        return [_local(c, demand, config) for c in hybrids + decodes]
    if Role.DECODE not in roles:
        # Hybrid engines decode as well as a decode engine would: prefill engines step in only where nobody else can.
        return [_local(c, demand, config) for c in hybrids or ([] if Role.HYBRID in roles else prefills)]
    short = [c for c in decodes if _is_short(c, demand, config)]
    paired = [c for c in decodes if not _is_short(c, demand, config)]
    options = [_local(c, demand, config) for c in hybrids + short]
    if demand.retry:
        # Dearer than a healthy pair, cheaper than a pair that has just failed.
        retried = [_local(c, demand, config) for c in paired]
        options += [_Option(option.placement, option.cost_s + config.avoid_s / 2) for option in retried]
    starts = [(p, _first_token_s(p, demand, config)) for p in prefills]
    finishes = [(d, _rest_s(d, demand, config)) for d in paired]
    options += [
        _Option(_pair(p, d), start_s + rest_s + _tail_s(p, d, demand, config))
        for p, start_s in starts
        for d, rest_s in finishes
    ]
    return options


def _is_short(decode: Candidate, demand: Demand, config: RouterConfig) -> bool:
    return demand.context_tokens - decode.cached_tokens < config.local_prefill_max_tokens


def _pair(prefill: Candidate, decode: Candidate) -> Pair:
    return Pair(prefill.view.info, decode.view.info, prefill.cached_tokens, decode.cached_tokens)


def _local(candidate: Candidate, demand: Demand, config: RouterConfig) -> _Option:
    cost_s = _first_token_s(candidate, demand, config) + _rest_s(candidate, demand, config)
    if candidate.avoided:
        cost_s -= config.avoid_s  # counted in both terms
    return _Option(Local(candidate.view.info, candidate.cached_tokens), cost_s)


def _first_token_s(candidate: Candidate, demand: Demand, config: RouterConfig) -> float:
    view = candidate.view
    uncached = max(1, demand.context_tokens - candidate.cached_tokens)
    cost_s = view.times.prefill_s(view.queued_prefill_tokens) + _work_s(view, uncached, config)
    return cost_s + config.avoid_s if candidate.avoided else cost_s


def _work_s(view: EngineView, uncached: int, config: RouterConfig) -> float:
    """Compute counts as waiting and again as work that others wait for. Without that, a sibling of a prompt that is
    being computed would gain nothing by waiting for it, and all would scatter."""
    return (1 + config.work_weight) * view.times.prefill_s(uncached)


def _rest_s(candidate: Candidate, demand: Demand, config: RouterConfig) -> float:
    view = candidate.view
    tokens = min(demand.max_output_tokens, config.expected_output_tokens)
    cost_s = tokens * view.times.step_s(view.decoding + demand.samples)
    if view.available_blocks * view.info.block_size < demand.context_tokens - candidate.cached_tokens:
        cost_s += config.no_room_s
    return cost_s + config.avoid_s if candidate.avoided else cost_s


def _tail_s(prefill: Candidate, decode: Candidate, demand: Demand, config: RouterConfig) -> float:
    """What is sent after the last compute: one chunk."""
    to_send = demand.context_tokens - decode.cached_tokens
    return min(to_send, prefill.view.info.prefill_chunk_tokens) * config.transfer_s_per_token


# -- admission -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Excess:
    reason: str
    clears_in_s: float


def _excess(candidate: Candidate, demand: Demand, config: RouterConfig) -> _Excess | None:
    """Why this engine takes no more at present, and when it will."""
    view = candidate.view
    if view.full:
        reason = f"{view.own_legs} requests are there"
        return _Excess(reason, _ends_s(view, max(1, view.own_legs + 1 - view.info.max_requests), config))
    if not config.admission:
        return None
    queued = view.queued_prefill_tokens
    if queued > 0 and queued + demand.context_tokens > config.max_queued_prefill_tokens:
        over = queued + demand.context_tokens - config.max_queued_prefill_tokens
        reason = f"{queued} prompt tokens are queued"
        return _Excess(reason, view.times.prefill_s(min(over, queued)))
    if view.waiting_requests >= config.max_waiting_requests:
        over = view.waiting_requests - config.max_waiting_requests + 1
        return _Excess(f"{view.waiting_requests} requests wait", _ends_s(view, over, config))
    return None


def _ends_s(view: EngineView, requests: int, config: RouterConfig) -> float:
    """How long until so many have ended: about one sequence in `expected_output_tokens` ends a step, times those that
    run."""
    ends_per_step = max(1, view.decoding - view.waiting_requests) / config.expected_output_tokens
    return requests / ends_per_step * view.times.step_s(view.decoding)


def _refusal(candidates: Sequence[Candidate], demand: Demand, config: RouterConfig) -> Refused:
    excesses = [excess for c in candidates if (excess := _excess(c, demand, config)) is not None]
    first = min(excesses, key=lambda excess: excess.clears_in_s)
    return Refused(f"every engine is busy: {first.reason} on the one that is free first", first.clears_in_s)
