"""The router of one ingress: the engines it can reach, its book of requests in flight, and `place`.

    place(request)  ──> Pair | Local | Refused | Unavailable      a decision, nothing is noted yet
    book(request, placement) ──> Booking                          the request was sent
    first_token(booking)                                          its prompt is computed
    handed_over(booking)                                          its KV is at the decode engine, which decodes
    release(booking)                                              it ended, however

A library: no I/O, no clock and no randomness of its own, one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from kvbaton.engine.block_hash import BlockHash, block_hashes
from kvbaton.engine.request import Request
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.placement import (
    Candidate,
    Decision,
    Demand,
    EngineView,
    Local,
    Placement,
    RouterConfig,
    Unavailable,
    decide,
)
from kvbaton.router.prefix_index import PrefixIndex
from kvbaton.router.time_model import TimeModel


@dataclass(slots=True)
class Booking:
    """The router's note of one request in flight. Each step of it may be told once too often."""

    placement: Placement
    hashes: list[BlockHash]  # of the context, as the decode engine cuts it into blocks
    prefill: EngineView
    decode: EngineView
    prefill_tokens: int
    context_tokens: int
    samples: int
    queued_before: int
    booked_at: float
    prefilling: bool = True
    handing_over: bool = False  # prefill has the request until decode has its KV
    live: bool = True


class Router:
    """Places requests on the engines that were added; see the module's text."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float], rng: Random) -> None:
        self.config = config
        self.index = PrefixIndex()
        self._clock = clock
        self._rng = rng
        self._views: dict[str, EngineView] = {}
        # One model a role: engines of a role are alike, and twins with the same work must cost exactly the same.
        self._times = {role: TimeModel(config.prefill_s_per_token, config.decode_step_s) for role in Role}
        self._hashes = _Hashes(None)
        self._generations: dict[str, int] = {}  # of what the prefix index knows

    @property
    def engines(self) -> tuple[EngineInfo, ...]:
        """Engines that can be reached, in whatever state."""
        return tuple(view.info for view in self._views.values())

    def view(self, engine_id: str) -> EngineView | None:
        return self._views.get(engine_id)

    def add(self, info: EngineInfo) -> None:
        """An engine can be reached, or its entry changed. Another generation starts with an empty book and cache."""
        if self._generations.get(info.engine_id, info.generation) != info.generation:
            self.remove(info.engine_id)
        self._generations[info.engine_id] = info.generation
        view = self._views.get(info.engine_id)
        if view is None:
            self._views[info.engine_id] = EngineView(info, self._times[info.role])
        else:
            view.info, view.times = info, self._times[info.role]

    def unreachable(self, engine_id: str) -> None:
        """No session to the engine at present: no placements, and its book is void. Its cache is remembered."""
        self._views.pop(engine_id, None)

    def remove(self, engine_id: str) -> None:
        """The engine is gone for good."""
        self.unreachable(engine_id)
        self._generations.pop(engine_id, None)
        self.index.remove(engine_id)

    def refused(self, engine_id: str) -> None:
        """The engine has no room, whatever the book says, until its next numbers come."""
        view = self._views.get(engine_id)
        if view is not None:
            view.refusing = True

    def has_room(self) -> bool:
        """Whether any engine takes another request."""
        return any(view.info.state is EngineState.READY and not view.full for view in self._views.values())

    def observe(self, engine_id: str, load: EngineLoad) -> None:
        """Numbers of a frame."""
        view = self._views.get(engine_id)
        if view is not None:
            view.observe(load)

    def place(self, request: Request, avoid: frozenset[str] = frozenset(), admit: bool = True) -> Decision:
        """Decide where the request runs. A retry names engines to `avoid` while there are others, and with `admit`
        False is not refused for load: it was admitted before."""
        tokens = len(request.context)
        now = self._clock()
        hashes = self._hashes_of(request)
        usable = [view for view in self._views.values() if _can_serve(view.info, tokens)]
        if not usable and any(view.info.state is EngineState.READY for view in self._views.values()):
            return Unavailable(f"no engine takes {tokens} tokens")
        candidates = [self._candidate(view, hashes, tokens, now, avoid) for view in usable]
        left = request.sampling.max_tokens - len(request.emitted)
        demand = Demand(tokens, left, len(request.sample_indices), retry=bool(avoid))
        config = self.config if admit else replace(self.config, admission=False)
        return decide(candidates, demand, config, self._rng)

    def book(self, request: Request, placement: Placement) -> Booking:
        """Note that the request was sent as `place` decided."""
        now = self._clock()
        hashes = self._hashes_of(request)
        tokens = len(request.context)
        if isinstance(placement, Local):
            prefill_info = decode_info = placement.engine
            cached = placement.cached_tokens
        else:
            prefill_info, decode_info = placement.prefill, placement.decode
            cached = placement.prefill_cached_tokens
        prefill, decode = self._view_of(prefill_info), self._view_of(decode_info)
        samples = len(request.sample_indices)
        booking = Booking(
            placement,
            hashes.of(decode_info.block_size),
            prefill,
            decode,
            tokens - cached,
            tokens,
            samples,
            prefill.queued_prefill_tokens,
            now,
            handing_over=prefill is not decode,
        )
        prefill.own_legs += booking.handing_over
        decode.own_legs += 1
        prefill.own_prefill_tokens += booking.prefill_tokens
        decode.own_requests += samples
        decode.own_context_tokens += tokens * samples
        self.index.placed(prefill_info.engine_id, hashes.of(prefill_info.block_size), now)
        return booking

    def place_migration(self, tokens: int, source: str) -> EngineInfo | None:
        """The best engine to go on with a sequence of `tokens` that decodes at `source`; None if there is no other."""
        others = [v for v in self._views.values() if v.info.engine_id != source and not v.full]
        views = [v for v in others if _can_serve(v.info, tokens)]
        fitting = [v for v in views if v.available_blocks * v.info.block_size >= tokens] or views
        decoders = [v for v in fitting if v.info.role is not Role.PREFILL] or fitting
        best = min(decoders, key=lambda v: (v.decoding, v.own_context_tokens), default=None)
        return None if best is None else best.info

    def book_migration(self, request: Request, to: EngineInfo) -> Booking:
        """Note that one sample moves to `to` with its KV: nothing is computed again."""
        tokens, view = len(request.context), self._view_of(to)
        booking = Booking(Local(to, tokens), [], view, view, 0, tokens, 1, 0, self._clock(), prefilling=False)
        view.own_legs += 1
        view.own_requests += 1
        view.own_context_tokens += tokens
        return booking

    def first_token(self, booking: Booking) -> None:
        """The prompt is computed: it queues no more, and shows how fast the engine is."""
        if booking.live and booking.prefilling:
            elapsed_s = self._clock() - booking.booked_at
            booking.prefill.times.observe_prefill(booking.queued_before + booking.prefill_tokens, elapsed_s)
            self._prefill_over(booking)

    def handed_over(self, booking: Booking) -> None:
        """Decode has begun: prefill is done with the request, and the prompt's blocks are at the decode engine. Not
        before: a request that ends with its first token is never handed over."""
        if booking.live and booking.handing_over:
            self._hand_over_ends(booking)
            self.index.placed(booking.decode.info.engine_id, booking.hashes, self._clock())

    def release(self, booking: Booking) -> None:
        """The request ended or moved elsewhere."""
        if booking.live:
            self._prefill_over(booking)
            self._hand_over_ends(booking)
            booking.live = False
            booking.decode.own_legs -= 1
            booking.decode.own_requests -= booking.samples
            booking.decode.own_context_tokens -= booking.context_tokens * booking.samples

    def _hand_over_ends(self, booking: Booking) -> None:
        if booking.handing_over:
            booking.handing_over = False
            booking.prefill.own_legs -= 1

    def _prefill_over(self, booking: Booking) -> None:
        if booking.prefilling:
            booking.prefilling = False
            booking.prefill.own_prefill_tokens -= booking.prefill_tokens

    def _candidate(
        self, view: EngineView, hashes: _Hashes, tokens: int, now: float, avoid: frozenset[str]
    ) -> Candidate:
        info = view.info
        blocks = self.index.match(info.engine_id, hashes.of(info.block_size), now)
        # The last token is always computed: its logits are what the first sample is drawn from.
        cached = min(blocks * info.block_size, tokens - 1)
        return Candidate(view, cached, avoided=info.engine_id in avoid)

    def _hashes_of(self, request: Request) -> _Hashes:
        """Kept from `place` to `book`: hashing a long prompt is the dearest part of both."""
        if self._hashes.request is not request:
            self._hashes = _Hashes(request)
        return self._hashes

    def _view_of(self, info: EngineInfo) -> EngineView:
        view = self._views.get(info.engine_id)
        if view is None or view.info.generation != info.generation:
            raise ValueError(f"engine {info.engine_id} generation {info.generation} is not reachable")
        return view


class _Hashes:
    """Block hashes of a request's context, computed once for each block size that is asked for."""

    def __init__(self, request: Request | None) -> None:
        self.request = request
        self._by_size: dict[int, list[BlockHash]] = {}

    def of(self, block_size: int) -> list[BlockHash]:
        hashes = self._by_size.get(block_size)
        if hashes is None and self.request is not None:
            request = self.request
            hashes = block_hashes(request.context, block_size, request.cache_salt, len(request.prompt))
            self._by_size[block_size] = hashes
        return hashes or []


def _can_serve(info: EngineInfo, tokens: int) -> bool:
    return info.state is EngineState.READY and tokens < info.max_model_len
