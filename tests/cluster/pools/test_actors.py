"""What an operator reads when an engine dies: one line, with the cause."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError, RayTaskError

from kvbaton.cluster.pools.actors import reason_of
from kvbaton.settings import ConfigError

RAY_TEXT = """The actor died unexpectedly before finishing this task.
	class_name: EngineActor
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) it was killed"""


class Died(RayActorError):
    """Ray's account of a dead actor, in the words of a test."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def __str__(self) -> str:
        return self._text


@pytest.mark.ray
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (RAY_TEXT, "Worker unexpectedly exits with a connection error code 2 (SYSTEM_ERROR)"),
        ("\n killed by ray.kill\n more", "killed by ray.kill"),
        ("", "no reason given"),
    ],
)
def test_rays_page_of_advice_becomes_one_line(text: str, reason: str) -> None:
    assert reason_of(Died(text)) == f"engine process died: {reason}"


@pytest.mark.ray
def test_an_error_inside_the_actor_is_shown_without_rays_wrapping() -> None:
    error = RayTaskError("start", "a long traceback", ConfigError("model.safetensors is damaged"))
    assert reason_of(error) == "ConfigError: model.safetensors is damaged"
    assert reason_of(TimeoutError()) == "no answer in time"
