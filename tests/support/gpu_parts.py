"""Parts of a GPU check that end badly, each in its way. They run in processes of their own, which import this file."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterator

import torch
from gpucheck.checks import CheckResult
from gpucheck.parts import Found, Options

LOST = torch.device("meta")  # stands for a device on which nothing can be computed any more


def good(number: int) -> Found:
    return "checks", CheckResult(f"c{number}", 0.0, 0.0, 0.1)


def ends_badly(name: str, options: Options) -> Iterator[Found]:
    """Finds one value, then does what its name says."""
    yield good(0)
    match name:
        case "raises":
            raise ValueError("no such shape")
        case "crashes":
            ctypes.string_at(0)
        case "hangs":
            time.sleep(600.0)
    yield good(1)


def checks_with_faults(name: str, options: Options) -> Iterator[Found]:
    """Five checks: the second ends its process, the fourth breaks the device, which would fail the fifth too."""
    broken = False
    for number in range(options.first_check, 5):
        if number == 1:
            os._exit(9)
        if broken:
            raise RuntimeError("an earlier fault makes everything fail")
        broken = number == 3
        problem = "illegal memory access" if broken else None
        yield "checks", CheckResult(f"c{number}", math.nan if broken else 0.0, 0.0, 0.1, problem=problem)
