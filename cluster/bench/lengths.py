"""How long prompts and answers are: a length specification as written on the command line, and its draws.

128              always 128
64:256           uniform from 64 to 256, both ends possible
normal:512,128   normal with mean 512 and standard deviation 128
lognormal:512,1  log-normal with median 512 and sigma 1
choice:16,2048   one of the listed values, each equally often
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class LengthError(ValueError):
    """A length specification that does not parse, or that could give a length below one."""


class Lengths(Protocol):
    """A distribution over token counts; every draw is at least 1."""

    def draw(self, rng: np.random.Generator) -> int: ...


@dataclass(frozen=True, slots=True)
class Fixed:
    tokens: int

    def draw(self, rng: np.random.Generator) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class Uniform:
    low: int
    high: int

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class Normal:
    mean: float
    deviation: float

    def draw(self, rng: np.random.Generator) -> int:
        return max(1, round(rng.normal(self.mean, self.deviation)))


@dataclass(frozen=True, slots=True)
class Lognormal:
    median: float
    sigma: float

    def draw(self, rng: np.random.Generator) -> int:
        return max(1, round(rng.lognormal(math.log(self.median), self.sigma)))


@dataclass(frozen=True, slots=True)
class Choice:
    values: tuple[int, ...]

    def draw(self, rng: np.random.Generator) -> int:
        return self.values[int(rng.integers(len(self.values)))]


def parse_lengths(text: str) -> Lengths:
    """Read a specification (see the top of this file); raises `LengthError` that quotes it."""
    name, colon, rest = text.partition(":")
    try:
        if not colon:
            return Fixed(_count(text))
        if name.isdigit():
            return _uniform(_count(name), _count(rest))
        return _named(name, [float(part) for part in rest.split(",")])
    except ValueError as error:
        raise LengthError(f"length {text!r}: {error}") from error


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError("must be at least 1")
    return value


def _uniform(low: int, high: int) -> Uniform:
    if high < low:
        raise ValueError("the upper end is below the lower end")
    return Uniform(low, high)


def _named(name: str, values: list[float]) -> Lengths:
    if name == "choice":
        return Choice(tuple(_whole(value) for value in values))
    if name not in ("normal", "lognormal"):
        raise ValueError("not a number, LOW:HIGH, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA or choice:A,B,..")
    if len(values) != 2 or values[0] < 1 or values[1] < 0:
        raise ValueError(f"{name} takes two numbers, the first at least 1, the second not negative")
    return Normal(*values) if name == "normal" else Lognormal(*values)


def _whole(value: float) -> int:
    if value < 1 or value != int(value):
        raise ValueError("choice takes whole numbers of at least 1")
    return int(value)
