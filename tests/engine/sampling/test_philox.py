"""The counter-based generator: published vectors, and what the sampler relies on."""

from __future__ import annotations

import numpy as np
import pytest

from kvbaton.engine.sampling.token_draw import draw_keys, philox4x32

# Known answers of Philox4x32-10 from the authors' Random123 distribution (counter, key, result).
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Guards the algorithm: an engine of another build must draw the same tokens."""
    lanes = [np.array([word], dtype=np.uint64) for word in counter + key]
    words = philox4x32((lanes[0], lanes[1], lanes[2], lanes[3]), (lanes[4], lanes[5]))
    assert tuple(int(word[0]) for word in words) == wanted


def test_the_numbers_of_a_draw_never_change() -> None:
    """Guards resumed requests across versions: these are part of the protocol between engines."""
    drawn = draw_keys([0, 1, -1, 2**63 - 1], [0, 0, 3, 15], [1, 1, 7, 2**33])
    words = [(0, 1, 0), (1, 1, 0), (2**64 - 1, 7, 3), (2**63 - 1, 2**33, 15)]
    for value, (seed, position, sample) in zip(drawn.tolist(), words, strict=True):
        lanes = [position & 0xFFFFFFFF, position >> 32, sample, 0, seed & 0xFFFFFFFF, seed >> 32]
        c0, c1, c2, c3, k0, k1 = (np.array([lane], dtype=np.uint64) for lane in lanes)
        a, b, *_ = (int(word[0]) for word in philox4x32((c0, c1, c2, c3), (k0, k1)))
        assert value == a + (b << 32)


def test_alone_or_in_a_batch_is_the_same_number() -> None:
    """Guards independence of the batch."""
    seeds, samples, positions = [5, 5, 6, -9], [0, 1, 0, 2], [10, 10, 10, 4]
    together = draw_keys(seeds, samples, positions).tolist()
    alone = [draw_keys([s], [i], [p]).item() for s, i, p in zip(seeds, samples, positions, strict=True)]
    assert together == alone
    assert len(set(together)) == 4


def test_uniform_in_every_coordinate() -> None:
    """Guards against correlated neighbours: seeds, samples and positions that differ by one are independent draws."""
    count = 20_000
    line = list(range(count))
    zeros = [0] * count
    for keys in (draw_keys(line, zeros, zeros), draw_keys(zeros, line, zeros), draw_keys(zeros, zeros, line)):
        drawn = keys / 2.0**64
        cells = np.bincount((drawn * 20).astype(int), minlength=20)
        assert ((cells - count / 20) ** 2 / (count / 20)).sum() < 43.8  # chi-squared, 19 degrees, p = 0.001
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
