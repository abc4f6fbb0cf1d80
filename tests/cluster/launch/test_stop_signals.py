"""Ctrl-C of a launcher: never lost, and never an exception in the middle of an import."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from kvbaton.cluster.launch.stop_signals import StopSignals


def press(number: signal.Signals = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_start_is_kept_until_it_can_be_handled(number: signal.Signals) -> None:
    with StopSignals() as signals:
        press(number)
        with pytest.raises(KeyboardInterrupt, match=number.name):
            signals.catch()


def test_a_signal_during_imports_comes_after_them() -> None:
    """Guards against half a module: what uses it later fails with an error that has nothing to do with Ctrl-C."""
    reached = []

    def imports() -> None:
        with signals.kept():
            press()
            reached.append("the end of the import")

    with StopSignals() as signals:
        signals.catch()
        with pytest.raises(KeyboardInterrupt):
            imports()
    assert reached == ["the end of the import"]


def test_a_signal_that_a_library_swallows_comes_again() -> None:
    """Guards against a Ctrl-C without effect: libraries have finalizers and callbacks that drop every exception."""
    with StopSignals() as signals:
        signals.catch()
        with contextlib.suppress(KeyboardInterrupt):
            press()
        with pytest.raises(KeyboardInterrupt):
            signals.catch()


def test_the_handlers_of_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.catch()
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
