"""The fast set: `pytest --fast` runs the tests that start no process and take little time, for the inner loop.

Marks say which tests those are: `process`, `ray`, `redis`, `ucx`, `gpu` and `chaos` for what needs more than this
process, `slow` for what takes a second. The guard keeps the marks honest: a test without a mark of `MAY_START` that
starts a process fails, in every run and not only in a fast one, even where the code under test swallows the refusal.
"""

from __future__ import annotations

import multiprocessing.util
import os
import subprocess
from collections.abc import Callable, Generator
from typing import Any

import pytest

MAY_START = ("process", "ray", "redis", "ucx", "gpu", "chaos")
NOT_FAST = (*MAY_START, "slow")
# Every way to a new process ends at one of these: asyncio and Ray at Popen, multiprocessing at fork or spawnv_passfds.
WAYS: tuple[tuple[Any, str], ...] = (
    (subprocess.Popen, "__init__"),
    (multiprocessing.util, "spawnv_passfds"),
    (os, "fork"),
    (os, "posix_spawn"),
    (os, "posix_spawnp"),
    (os, "system"),
)


class ProcessRefused(RuntimeError):
    """A test without a mark for it has started a process."""


class ProcessGuard:
    """Refuses each start of a process while `watching`, and remembers it in `refused`."""

    def __init__(self) -> None:
        self.watching = False
        self.refused: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def install(self) -> None:
        for owner, name in WAYS:
            self._patch.setattr(owner, name, self._guarded(f"{owner.__name__}.{name}", getattr(owner, name)))

    def remove(self) -> None:
        self._patch.undo()

    def _guarded(self, name: str, start: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.watching:
                what = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, list | tuple | str)), "")
                self.refused.append(f"{name} {what}")
                raise ProcessRefused(self.refused[-1])
            return start(*args, **kwargs)

        return guarded


class FastSet:
    """The plugin: takes the other tests out of a fast run, and watches each test that may not start a process."""

    def __init__(self, only_fast: bool) -> None:
        self._only_fast = only_fast
        self._guard = ProcessGuard()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if not self._only_fast:
            return
        fast: list[pytest.Item] = []
        others: list[pytest.Item] = []
        for item in items:
            (others if _has_mark(item, NOT_FAST) else fast).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = fast

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, object, object]:
        self._guard.install()
        try:
            return (yield)
        finally:
            self._guard.remove()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._watched(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._watched(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        yield from self._watched(item)

    def _watched(self, item: pytest.Item) -> Generator[None, None, None]:
        self._guard.refused.clear()
        self._guard.watching = not _has_mark(item, MAY_START)
        try:
            yield
        finally:
            self._guard.watching = False
            if self._guard.refused:
                pytest.fail(f"mark it `process`: it starts {self._guard.refused[0]}", pytrace=False)


def _has_mark(item: pytest.Item, names: tuple[str, ...]) -> bool:
    return any(item.get_closest_marker(name) for name in names)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"leave out tests marked {', '.join(NOT_FAST)}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FastSet(config.getoption("--fast")), "fast-set")
