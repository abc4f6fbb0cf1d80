"""The agent's own thread: polls while there is work, sleeps in the transport's wait when there is none."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from kvbaton.kvtransfer.transport import Transport

log = logging.getLogger(__name__)

_SPINS_WHILE_MOVING = 200  # empty polls before sleeping while blocks are moving


class Pollable(Protocol):
    """The agent, as its thread sees it."""

    @property
    def busy(self) -> bool: ...

    def poll(self) -> bool: ...

    def wait_s(self) -> float: ...

    def abandon(self, reason: str) -> None: ...


class AgentThread:
    """`start` returns once the transport is open, or raises what it raised."""

    def __init__(self, agent: Pollable, transport: Transport) -> None:
        self._agent = agent
        self._transport = transport
        self._stopping = False
        self._opened = threading.Event()
        self._open_error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="kvtransfer", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._opened.wait()
        if self._open_error is not None:
            raise self._open_error

    def stop(self) -> None:
        """Idempotent; returns when the thread has ended."""
        self._stopping = True
        if self._thread.is_alive():
            self._transport.wake()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._transport.open()
        except Exception as error:
            self._open_error = error
            return
        finally:
            self._opened.set()
        while not self._stopping:
            try:
                self._loop()
            except Exception as error:
                log.exception("a bug in the transfer agent: every session is closed")
                self._agent.abandon(f"internal error in the transfer agent: {error}")

    def _loop(self) -> None:
        spins = 0
        while not self._stopping:
            if self._agent.poll():
                spins = 0
                continue
            spins += 1
            if spins > _SPINS_WHILE_MOVING or not self._agent.busy:
                self._transport.wait(self._agent.wait_s())
                spins = 0
