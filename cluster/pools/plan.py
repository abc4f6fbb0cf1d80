"""What must change so that the engines that exist become the engines that are wanted. Pure functions, no clock, no I/O.

A role switch takes about a second, a new engine tens of seconds: surplus engines of one role are switched to another
first. What is left is either only starts or only stops, never both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.pools.supervisor import EngineStatus
from kvbaton.router.engine_info import Role


@dataclass(frozen=True, slots=True)
class Switch:
    """Change the role of an engine that is up."""

    engine_id: str
    role: Role


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """`starts` are roles, one entry an engine; `stops` are engine ids."""

    switches: tuple[Switch, ...] = ()
    starts: tuple[Role, ...] = ()
    stops: tuple[str, ...] = ()


def wanted_counts(pools: PoolsConfig) -> dict[Role, int]:
    """Engines per role, every role present."""
    return {Role.PREFILL: pools.prefill, Role.DECODE: pools.decode, Role.HYBRID: pools.hybrid}


def plan_pools(engines: Sequence[EngineStatus], pools: PoolsConfig) -> PoolPlan:
    """The changes from `engines` to `pools`. The least useful engines of a role go first: not ready, then newest id."""
    wanted = wanted_counts(pools)
    surplus = [engine for role in Role for engine in _surplus(engines, role, wanted)]
    missing = [role for role in Role for _ in range(wanted[role] - _count(engines, role))]
    donors = sorted(surplus, key=lambda engine: not engine.ready)  # stable: ready ones switch, the others can only stop
    switched = donors[: len(missing)]
    return PoolPlan(
        switches=tuple(Switch(engine.engine_id, role) for engine, role in zip(switched, missing, strict=False)),
        starts=tuple(missing[len(switched) :]),
        stops=tuple(engine.engine_id for engine in donors[len(missing) :]),
    )


def _count(engines: Sequence[EngineStatus], role: Role) -> int:
    return sum(engine.role is role for engine in engines)


def _surplus(engines: Sequence[EngineStatus], role: Role, wanted: Mapping[Role, int]) -> list[EngineStatus]:
    """The engines of a role beyond the wanted number, least useful first."""
    mine = sorted((engine for engine in engines if engine.role is role), key=_usefulness)
    return mine[: max(0, len(mine) - wanted[role])]


def _usefulness(engine: EngineStatus) -> tuple[bool, int, str]:
    """Ascending: not ready before ready, then the newest id first."""
    prefix, _, number = engine.engine_id.rpartition("-")
    return (engine.ready, -int(number) if number.isdigit() else 0, prefix)


def free_ids(taken: Sequence[str], count: int) -> list[str]:
    """The lowest `engine-N` that are not in use. An id says nothing of a role: roles change, ids stay."""
    used = set(taken)
    found: list[str] = []
    number = 0
    while len(found) < count:
        if (engine_id := f"engine-{number}") not in used:
            found.append(engine_id)
        number += 1
    return found
