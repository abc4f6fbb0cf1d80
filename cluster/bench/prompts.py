"""Prompts as token ids: random, reproducible, and sharing exactly the prefixes that the workload says.

A prompt is a row of segments. Each segment names an endless stream of tokens by (kind, key) and takes the first
`num_tokens` of it, so equal segments are equal tokens in every request and in every run with the same seed:

    own prompt of request 7            [ own 7: 128 ]
    group 3 with a shared prefix       [ group 3: 512 | own 7: 128 ]
    Mooncake hash_ids [0, 42, 43]      [ block 0: 512 | block 42: 512 | block 43: 266 ]
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]  # [num_tokens]


class Kind(enum.IntEnum):
    """What names a token stream. The numbers seed the generator: do not renumber."""

    OWN = 0
    GROUP = 1
    BLOCK = 2
    WARMUP = 3


@dataclass(frozen=True, slots=True)
class Segment:
    kind: Kind
    key: int
    num_tokens: int


class PromptTokens:
    """Turns segments into token ids of a vocabulary. Pure: the same seed and segments give the same ids."""

    def __init__(self, vocabulary: Sequence[int], seed: int) -> None:
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        self._vocabulary = np.asarray(vocabulary, dtype=np.int64)  # [num_ids]
        self._seed = seed

    def tokens(self, segments: Sequence[Segment]) -> Tokens:
        """The ids of all segments in a row: [sum of num_tokens]."""
        return np.concatenate([self._segment(segment) for segment in segments])

    def _segment(self, segment: Segment) -> Tokens:
        rng = np.random.default_rng((self._seed, segment.kind, segment.key))
        picks = rng.integers(len(self._vocabulary), size=segment.num_tokens)
        return self._vocabulary[picks]
