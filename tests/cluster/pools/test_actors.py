"""What an operator reads when an engine dies: one line, with the cause."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from kvbaton.cluster.pools.actors import _exit_detail, reason_of
from kvbaton.engine.config import ConfigError

RAY_TEXT = """The actor died unexpectedly before finishing this task.
	class_name: EngineActor
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) it was killed"""


@pytest.mark.ray
def test_rays_page_of_advice_becomes_one_line() -> None:
    assert _exit_detail(RAY_TEXT) == "Worker unexpectedly exits with a connection error code 2 (SYSTEM_ERROR)"
    assert _exit_detail("\n killed by ray.kill\n more") == "killed by ray.kill"
    assert _exit_detail("") == "no reason given"


@pytest.mark.ray
def test_an_error_inside_the_actor_is_shown_without_rays_wrapping() -> None:
    error = RayTaskError("start", "a long traceback", ConfigError("model.safetensors is damaged"))
    assert reason_of(error) == "ConfigError: model.safetensors is damaged"
    assert reason_of(TimeoutError()) == "no answer in time"
