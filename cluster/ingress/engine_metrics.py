"""The cluster's part of `/metrics`: the engines as this ingress sees them, and what became of its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from kvbaton.cluster.client.client import ClientCounters, ClusterClient
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState
from kvbaton.router.placement import EngineView

Family = GaugeMetricFamily | CounterMetricFamily


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over all engines.

    `values` gives those of one engine: a single one, or one for each of `parts`, which are the values of `part_label`.
    A gauge's name may end with `_total` too: `counter` says what it is.
    """

    name: str
    help: str
    values: Callable[[EngineInfo, EngineLoad], tuple[float, ...]]
    part_label: str | None = None
    parts: tuple[str, ...] = ()
    counter: bool = False

    def family(self, views: Iterable[EngineView]) -> Family:
        kind = CounterMetricFamily if self.counter else GaugeMetricFamily
        labels = ["engine", "role"] if self.part_label is None else ["engine", "role", self.part_label]
        family = kind(self.name, self.help, labels=labels)
        for view in views:
            info, load = view.info, view.load or EngineLoad(free_blocks=view.info.num_blocks)
            values = self.values(info, load)
            parts: tuple[tuple[str, ...], ...] = tuple((part,) for part in self.parts) or ((),)
            for part, value in zip(parts, values, strict=True):
                family.add_metric([info.engine_id, info.role.value, *part], value)
        return family


_SERIES = (
    Series(
        "kvbaton_engine_kv_blocks",
        "KV blocks of an engine by state; the states add up to its pool.",
        lambda info, load: (load.free_blocks, load.held_blocks, load.cached_blocks),
        "state",
        ("free", "held", "cached"),
    ),
    Series(
        "kvbaton_engine_kv_blocks_owned",
        "KV blocks of an engine by their one owner; the owners add up to its pool.",
        lambda info, load: (
            load.free_blocks,
            load.cached_blocks,
            load.sequence_blocks,
            load.hold_blocks,
            load.landing_blocks,
            load.quarantine_blocks,
        ),
        "owner",
        ("free", "cache", "sequence", "hold", "landing", "quarantine"),
    ),
    Series("kvbaton_engine_kv_blocks_total", "Size of the KV pool in blocks.", lambda info, load: (info.num_blocks,)),
    Series(
        "kvbaton_engine_prefill_chunk_tokens",
        "Longest prefill chunk of an engine, set or measured at its start.",
        lambda info, load: (info.prefill_chunk_tokens,),
    ),
    Series(
        "kvbaton_engine_requests",
        "Requests at an engine by state.",
        lambda info, load: (load.waiting_requests, load.running_requests),
        "state",
        ("waiting", "running"),
    ),
    Series(
        "kvbaton_engine_queued_prefill_tokens",
        "Prompt tokens that wait to be computed.",
        lambda info, load: (load.queued_prefill_tokens,),
    ),
    Series(
        "kvbaton_engine_running_context_tokens",
        "Tokens in the KV cache of running sequences.",
        lambda info, load: (load.running_context_tokens,),
    ),
    Series("kvbaton_engine_step_seconds", "Duration of the last step.", lambda info, load: (load.step_s,)),
    Series("kvbaton_engine_generation", "Incarnation of an engine.", lambda info, load: (info.generation,)),
    Series(
        "kvbaton_engine_handoffs_completed_total",
        "Prompts and sequences that another engine has taken over from this one.",
        lambda info, load: (load.handoffs_acked,),
        counter=True,
    ),
    Series(
        "kvbaton_engine_handoffs_failed_total",
        "Hand-offs from or to this engine that failed; those that were given up are not among them.",
        lambda info, load: (load.handoffs_failed,),
        counter=True,
    ),
    Series(
        "kvbaton_engine_kv_checksum_failures_total",
        "Hand-offs to this engine that failed because a block that landed was not what had been sent.",
        lambda info, load: (load.checksum_failures,),
        counter=True,
    ),
)


class EngineMetrics(Collector):
    """Read at each scrape of the registry that it is registered with.

    Engines without a session have no numbers but an entry in `kvbaton_engine_up`. `listed` gives the engines of the
    membership list.
    """

    def __init__(self, listed: Callable[[], Iterable[EngineInfo]], client: ClusterClient) -> None:
        self._listed = listed
        self._client = client

    def collect(self) -> Iterator[Family]:
        router = self._client.router
        views = [view for info in router.engines if (view := router.view(info.engine_id)) is not None]
        yield self._up(views)
        for series in _SERIES:
            yield series.family(views)
        in_flight = self._client.in_flight
        yield GaugeMetricFamily("kvbaton_requests_in_flight", "Requests that this ingress has at engines.", in_flight)
        yield from _client_counters(self._client.counters)

    def _up(self, views: Iterable[EngineView]) -> Family:
        connected = {(view.info.engine_id, view.info.generation) for view in views}
        family = GaugeMetricFamily(
            "kvbaton_engine_up",
            "1 where this ingress has a session to the engine and it is ready.",
            labels=["engine", "role"],
        )
        for info in self._listed():
            up = (info.engine_id, info.generation) in connected and info.state is EngineState.READY
            family.add_metric([info.engine_id, info.role.value], float(up))
        return family


def _client_counters(counters: ClientCounters) -> Iterator[Family]:
    for field in fields(counters):
        what = field.name.replace("_", " ")
        yield CounterMetricFamily(
            f"kvbaton_requests_{field.name}", f"What this ingress counted: {what}.", getattr(counters, field.name)
        )
