"""The cluster's part of `/metrics`: the engines as this ingress sees them, and what became of its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from kvbaton.cluster.client.client import ClientCounters, ClusterClient
from kvbaton.cluster.store.registry import Membership
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState


@dataclass(frozen=True, slots=True)
class Series:
    """One metric over all engines; `values` gives (extra label, value) pairs of one engine."""

    name: str
    help: str
    values: Callable[[EngineInfo, EngineLoad], tuple[tuple[str, float], ...]]
    kind: str = "gauge"


_SERIES = (
    Series(
        "kvbaton_engine_kv_blocks",
        "KV blocks of an engine by state; the states add up to its pool.",
        lambda info, load: (
            ('state="free"', load.free_blocks),
            ('state="held"', load.held_blocks),
            ('state="cached"', load.cached_blocks),
        ),
    ),
    Series(
        "kvbaton_engine_kv_blocks_owned",
        "KV blocks of an engine by their one owner; the owners add up to its pool.",
        lambda info, load: (
            ('owner="free"', load.free_blocks),
            ('owner="cache"', load.cached_blocks),
            ('owner="sequence"', load.sequence_blocks),
            ('owner="hold"', load.hold_blocks),
            ('owner="landing"', load.landing_blocks),
            ('owner="quarantine"', load.quarantine_blocks),
        ),
    ),
    Series(
        "kvbaton_engine_kv_blocks_total", "Size of the KV pool in blocks.", lambda info, load: (("", info.num_blocks),)
    ),
    Series(
        "kvbaton_engine_prefill_chunk_tokens",
        "Longest prefill chunk of an engine, set or measured at its start.",
        lambda info, load: (("", info.prefill_chunk_tokens),),
    ),
    Series(
        "kvbaton_engine_requests",
        "Requests at an engine by state.",
        lambda info, load: (('state="waiting"', load.waiting_requests), ('state="running"', load.running_requests)),
    ),
    Series(
        "kvbaton_engine_queued_prefill_tokens",
        "Prompt tokens that wait to be computed.",
        lambda info, load: (("", load.queued_prefill_tokens),),
    ),
    Series(
        "kvbaton_engine_running_context_tokens",
        "Tokens in the KV cache of running sequences.",
        lambda info, load: (("", load.running_context_tokens),),
    ),
    Series("kvbaton_engine_step_seconds", "Duration of the last step.", lambda info, load: (("", load.step_s),)),
    Series("kvbaton_engine_generation", "Incarnation of an engine.", lambda info, load: (("", info.generation),)),
    Series(
        "kvbaton_engine_handoffs_completed_total",
        "Prompts and sequences that another engine has taken over from this one.",
        lambda info, load: (("", load.handoffs_acked),),
        "counter",
    ),
    Series(
        "kvbaton_engine_handoffs_failed_total",
        "Hand-offs from or to this engine that failed; those that were given up are not among them.",
        lambda info, load: (("", load.handoffs_failed),),
        "counter",
    ),
    Series(
        "kvbaton_engine_kv_checksum_failures_total",
        "Hand-offs to this engine that failed because a block that landed was not what had been sent.",
        lambda info, load: (("", load.checksum_failures),),
        "counter",
    ),
)


def render_engine_metrics(membership: Membership, client: ClusterClient) -> str:
    """Prometheus text. Engines without a session have no numbers but an entry in `kvbaton_engine_up`."""
    return "\n".join([*_engine_lines(membership, client), *_client_lines(client.counters, client.in_flight)]) + "\n"


def _engine_lines(membership: Membership, client: ClusterClient) -> Iterator[str]:
    views = [view for info in client.router.engines if (view := client.router.view(info.engine_id)) is not None]
    connected = {(view.info.engine_id, view.info.generation) for view in views}
    yield "# HELP kvbaton_engine_up 1 where this ingress has a session to the engine and it is ready."
    yield "# TYPE kvbaton_engine_up gauge"
    for info in membership.engines:
        up = (info.engine_id, info.generation) in connected and info.state is EngineState.READY
        yield f"kvbaton_engine_up{{{_labels(info)}}} {int(up)}"
    for series in _SERIES:
        yield f"# HELP {series.name} {series.help}"
        yield f"# TYPE {series.name} {series.kind}"
        for view in views:
            for extra, value in series.values(view.info, view.load or EngineLoad(free_blocks=view.info.num_blocks)):
                labels = ",".join(part for part in (_labels(view.info), extra) if part)
                yield f"{series.name}{{{labels}}} {value:.15g}"


def _client_lines(counters: ClientCounters, in_flight: int) -> Iterator[str]:
    yield "# HELP kvbaton_requests_in_flight Requests that this ingress has at engines."
    yield "# TYPE kvbaton_requests_in_flight gauge"
    yield f"kvbaton_requests_in_flight {in_flight}"
    for item in fields(counters):
        name = f"kvbaton_requests_{item.name}_total"
        yield f"# TYPE {name} counter"
        yield f"{name} {getattr(counters, item.name)}"


def _labels(info: EngineInfo) -> str:
    return f'engine="{info.engine_id}",role="{info.role.value}"'
