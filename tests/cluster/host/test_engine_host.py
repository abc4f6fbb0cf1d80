"""An engine as a process, as its ingresses see it."""

from __future__ import annotations

import pytest

from kvbaton.engine.tiny import Family
from support.local_cluster import LocalCluster
from support.oracle import TinyModels

pytestmark = [pytest.mark.process, pytest.mark.ucx]


async def test_its_blocks_are_told_before_its_first_step(tiny_model: TinyModels) -> None:
    """Guards routers and gauges from an engine that seems full, as it has nothing free, because nobody has used it."""
    async with LocalCluster(tiny_model(Family.LLAMA)) as cluster:
        for engine_id in cluster.engines:
            view = cluster.router.view(engine_id)
            assert view is not None
            assert view.load is not None
            assert (view.load.free_blocks, view.load.held_blocks) == (view.info.num_blocks, 0)
