"""Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A draw is a function of its key and counter and of nothing else: no state to carry along when a request moves, resumes
or shares a batch. All draws of a step are made at once, in integer arithmetic, so every machine gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # 32-bit values in 64-bit lanes, so that products do not overflow

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MASK64 = (1 << 64) - 1


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Four random words a lane from a counter of four and a key of two; all arrays have one shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> _32) ^ c1 ^ k0, right & _LOW, (left >> _32) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def draw_keys(seeds: Sequence[int], samples: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.uint64]:
    """64 random bits per (seed, sample index, sequence position)."""
    seed = np.array([value & _MASK64 for value in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    sample = np.array(samples, dtype=np.uint64)
    counter = (position & _LOW, position >> _32, sample & _LOW, sample >> _32)
    a, b, _, _ = philox4x32(counter, (seed & _LOW, seed >> _32))
    return a | (b << _32)
