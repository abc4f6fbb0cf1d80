"""Toy engines of both kinds, for tests that must hold with either."""

from __future__ import annotations

import pytest

from support.toy_engine import PipelinedToyEngine, ToyEngine


@pytest.fixture(params=[False, True], ids=["each", "pipelined"])
def _each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every toy engine waits for each step, or none does."""
    if request.param:
        monkeypatch.setattr(ToyEngine, "pipelined", PipelinedToyEngine.pipelined)
        monkeypatch.setattr(ToyEngine, "left_to_host", PipelinedToyEngine.left_to_host)
