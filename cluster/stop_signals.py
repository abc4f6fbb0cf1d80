"""Ctrl-C, SIGTERM and SIGHUP of a launcher: the first ends what it does, one more ends it by force."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_FORCED = 130

Handler = Callable[[int, FrameType | None], None]


class StopSignals:
    """In the block a signal raises `KeyboardInterrupt`: the one exception that a waiting `ray.get` lets through."""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.catch()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def catch(self) -> None:
        """Needed once more after `ray.init`, which puts a handler of its own there."""
        _install(_interrupt)

    def ending(self, say: Callable[[str], None]) -> None:
        """From now on things are taken down, and a signal means that this takes too long."""

        def force(number: int, frame: FrameType | None) -> None:
            say("ending by force")
            os._exit(EXIT_FORCED)

        _install(force)


def _install(handler: Handler) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)
