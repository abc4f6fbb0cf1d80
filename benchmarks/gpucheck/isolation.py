"""A part of the program in a process of its own: what breaks a CUDA context, or the process, or hangs, ends that part.

    ours     starts the process, takes what it finds, one value at a time
    theirs   finds, sends, says how it ended: DONE, or a traceback

An illegal access makes every later call of its process fail, so a process ends after a check that could not finish, and
the next check begins in a new one.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from gpucheck.checks import CheckResult
from gpucheck.parts import Found, Options, run_part

SILENCE_S = 150.0  # between two values; kernels are compiled and engines started in that time
ENDING_S = 5.0

Part = Callable[[str, Options], Iterator[Found]]


class PartFailed(Exception):
    """The part did not come to its end; the message says why."""


class OutOfTime(PartFailed):
    """The program's own time is used up."""


@dataclass(frozen=True, slots=True)
class Ended:
    """`problem` None: nothing is left to find. `broken`: the last value's own problem ended the process."""

    problem: str | None = None
    broken: bool = False


class ContextBroken(Exception):
    """The last value found says what happened; nothing more can be done in its process."""


def isolated(
    name: str, options: Options, deadline: float, silence_s: float = SILENCE_S, part: Part = run_part
) -> Iterator[Found]:
    """What `part` finds. Raises `PartFailed`, `OutOfTime` at `deadline` of the monotonic clock, or `ContextBroken`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_find, args=(theirs, part, name, options))
    process.start()
    theirs.close()
    try:
        while True:
            item = _next(ours, deadline, silence_s)
            if isinstance(item, Ended):
                process.join(ENDING_S)
                _tell(item)
                return
            yield item
    except EOFError:
        process.join()
        raise PartFailed(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()


def _next(pipe: Connection, deadline: float, silence_s: float) -> Found | Ended:
    left_s = deadline - time.monotonic()
    if not pipe.poll(max(0.0, min(silence_s, left_s))):
        if left_s < silence_s:
            raise OutOfTime("the time of the program was used up")
        raise PartFailed(f"nothing came for {silence_s:g} s")
    item: Found | Ended = pipe.recv()
    return item


def _tell(ended: Ended) -> None:
    if ended.broken:
        raise ContextBroken
    if ended.problem is not None:
        raise PartFailed(ended.problem)


def _find(pipe: Connection, part: Part, name: str, options: Options) -> None:
    try:
        for field, value in part(name, options):
            pipe.send((field, value))
            if isinstance(value, CheckResult) and value.problem is not None and not _usable(options.device):
                pipe.send(Ended(broken=True))
                return
        pipe.send(Ended())
    except Exception:
        pipe.send(Ended(traceback.format_exc()))


def _usable(device: torch.device) -> bool:
    try:
        return torch.ones(1, device=device).item() == 1.0
    except Exception:
        return False
