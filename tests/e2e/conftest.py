"""One launched cluster for all tests of a file: launching costs half a minute of CPU, idling half a core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.launcher import Launcher, survivors


@pytest.fixture(scope="module")
def cluster(tiny_model: Callable[[str], Path]) -> Iterator[Launcher]:
    """1 prefill + 1 decode engine and two ingress replicas, as `kvbaton serve` starts them."""
    launcher = Launcher(tiny_model("llama"), "--kv-memory", "16MiB", "--replicas", "2", "--served-model-name", "tiny")
    try:
        yield launcher.wait_ready()
        family = launcher.family()
        assert launcher.press_ctrl_c() == 0
        assert survivors(family, 5.0) == []
        last = [line.partition(" (")[0] for line in launcher.lines[-2:]]
        assert last == ["stopping ...", "stopped"]  # and nothing else: no traceback, no warning
    finally:
        launcher.close()
