"""What every folder of tests shares: one thread for torch, the tiny checkpoints, the fast set, and who runs where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbaton.kernels.native_lib import native_library
from support.fast_set import pytest_addoption, pytest_configure  # noqa: F401  hooks
from support.oracle import TinyModels, oracle_tokens
from support.real_model import ABSENT, real_model_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Longest first, so that no worker is left with them at the end: these wait for other processes most of the time.
LONGEST = ("tests/e2e/", "tests/faults/", "tests/kernels/", "tests/exactness/", "tests/packaging/", "tests/kvtransfer/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, all tests of a file go to one worker, and all that launch a cluster to one: two Ray
    clusters that start at the same time are slow enough to miss their deadlines on two cores."""
    from xdist.scheduler import LoadFileScheduling

    class ClustersOnOneWorker(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "e2e" if nodeid.startswith("tests/e2e/") else str(super()._split_scope(nodeid))

    return ClustersOnOneWorker(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a worker the longest files come first; one process alone begins with the tests that fail soonest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: next((i for i, n in enumerate(LONGEST) if item.nodeid.startswith(n)), len(LONGEST)))


@pytest.hookimpl(tryfirst=True)  # in a worker the loop itself stands before the hooks of a conftest
def pytest_runtestloop(session: pytest.Session) -> None:
    """The native library is compiled before the first test, which is not to be charged with that."""
    if not session.config.option.collectonly:
        native_library()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Results and timings must not depend on how many cores a machine has."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """`tiny_model("llama")` is the folder of that family's tiny checkpoint, made on first use."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; the test is skipped where it has not been fetched."""
    file = real_model_file()
    if file is None:
        pytest.skip(ABSENT)
    return file


@pytest.fixture(scope="session", name="oracle_tokens")
def _oracle_tokens() -> Callable[[Path, list[int], int], list[int]]:
    """`oracle_tokens(folder, prompt, n)`: the n greedy tokens of transformers."""
    return oracle_tokens
