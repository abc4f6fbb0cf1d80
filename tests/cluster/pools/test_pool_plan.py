"""The plan from what exists to what is wanted: switches before starts, never a start beside a stop."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbaton.cluster.config.cluster_config import PoolsConfig
from kvbaton.cluster.pools.plan import PoolPlan, Switch, free_ids, plan_pools, wanted_counts
from kvbaton.cluster.pools.supervisor import EngineStatus
from kvbaton.router.engine_info import EngineState, Role

P, D, H = Role.PREFILL, Role.DECODE, Role.HYBRID


def engine(number: int, role: Role, ready: bool = True) -> EngineStatus:
    return EngineStatus(f"engine-{number}", 1, role, EngineState.READY if ready else EngineState.DEAD)


def engines(*roles: Role, not_ready: tuple[int, ...] = ()) -> list[EngineStatus]:
    return [engine(i, role, i not in not_ready) for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("existing", "wanted", "plan"),
    [
        (engines(), PoolsConfig(1, 1), PoolPlan(starts=(P, D))),
        (engines(P, D), PoolsConfig(1, 1), PoolPlan()),
        (engines(P, P, D), PoolsConfig(1, 2), PoolPlan(switches=(Switch("engine-1", D),))),
        (engines(P, P, D), PoolsConfig(1, 3), PoolPlan(switches=(Switch("engine-1", D),), starts=(D,))),
        (engines(P, P, D), PoolsConfig(1, 1), PoolPlan(stops=("engine-1",))),
        (engines(P, P, P, D), PoolsConfig(1, 2), PoolPlan(switches=(Switch("engine-2", D),), stops=("engine-1",))),
        (engines(P, D), PoolsConfig(0, 0, 1), PoolPlan(switches=(Switch("engine-0", H),), stops=("engine-1",))),
    ],
)
def test_plans(existing: list[EngineStatus], wanted: PoolsConfig, plan: PoolPlan) -> None:
    assert plan_pools(existing, wanted) == plan


def test_an_engine_that_is_not_up_goes_before_one_that_serves() -> None:
    """Guards against stopping the only live engine of a role while a dead one waits for its restart."""
    assert plan_pools(engines(P, P, D, not_ready=(0,)), PoolsConfig(1, 1)) == PoolPlan(stops=("engine-0",))


def test_the_newest_engine_goes_by_number_not_by_text() -> None:
    existing = [engine(9, P), engine(10, P)]
    assert plan_pools(existing, PoolsConfig(1, 0)) == PoolPlan(stops=("engine-10",))


def test_free_ids_fill_gaps() -> None:
    assert free_ids(["engine-0", "engine-2"], 3) == ["engine-1", "engine-3", "engine-4"]


@given(
    st.lists(st.tuples(st.sampled_from(list(Role)), st.booleans()), max_size=12),
    st.builds(PoolsConfig, st.integers(0, 6), st.integers(0, 6), st.integers(0, 3)),
)
def test_a_plan_reaches_what_is_wanted(existing: list[tuple[Role, bool]], wanted: PoolsConfig) -> None:
    """Guards every mix: applying the plan gives exactly the wanted counts, and it never both starts and stops."""
    before = [engine(i, role, ready) for i, (role, ready) in enumerate(existing)]
    plan = plan_pools(before, wanted)
    assert not (plan.starts and plan.stops)
    roles = {one.engine_id: one.role for one in before if one.engine_id not in plan.stops}
    roles |= {switch.engine_id: switch.role for switch in plan.switches}
    after = Counter(roles.values()) + Counter(plan.starts)
    assert after == Counter({role: count for role, count in wanted_counts(wanted).items() if count})
