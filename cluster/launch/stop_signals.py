"""Ctrl-C, SIGTERM and SIGHUP to a launcher: the first one stops it in order, one more stops it by force."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_FORCED = 130

Handler = Callable[[int, FrameType | None], None]


class StopSignals:
    """In the block a signal is kept until `catch`, and from then on raises `KeyboardInterrupt`: the one exception that
    a waiting `ray.get` lets through. One that a library swallows is raised again by the next `catch`."""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._came: list[int] = []
        _install(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def catch(self) -> None:
        """Needed once more after `ray.init`, which installs its own handlers."""
        _install(self._interrupt)
        self._raise()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around imports: an exception out of nowhere leaves half a module behind there."""
        _install(self._keep)
        yield
        self.catch()

    def ending(self, say: Callable[[str], None]) -> None:
        """From now on things are taken down, and a signal means that this takes too long."""

        def force(number: int, frame: FrameType | None) -> None:
            say("ending by force")
            os._exit(EXIT_FORCED)

        _install(force)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)
        self._raise()

    def _raise(self) -> None:
        if self._came:
            raise KeyboardInterrupt(signal.Signals(self._came[0]).name)


def _install(handler: Handler) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)
