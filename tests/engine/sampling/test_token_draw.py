"""Random keys, temperature, cuts and the Gumbel-max draw: against published vectors and transformers' filters,
and exact in every batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kvbaton.engine.request import SamplingParams
from kvbaton.engine.sampling import token_draw
from kvbaton.engine.sampling.token_draw import draw_keys, draw_tokens, gumbel_noise, kept_scores, philox4x32

VOCAB = 400
CPU = torch.device("cpu")
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


def logits_of(rows: int, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def params(**values: Any) -> SamplingParams:
    return SamplingParams(max_tokens=1, **values)


def keys_of(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return draw_keys([seed] * count, [0] * count, range(count))


def kept(logits: torch.Tensor, **values: Any) -> torch.Tensor:
    return kept_scores(logits, [params(**values)] * len(logits)).isfinite()


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


def test_temperature_scales_the_scores() -> None:
    """Guards temperature: the softmax of the scores is that of logits / temperature, row by row."""
    logits, temperatures = logits_of(3), (0.5, 1.0, 2.0)
    scores = kept_scores(logits, [params(temperature=t) for t in temperatures])
    for row, temperature in enumerate(temperatures):
        torch.testing.assert_close(scores[row].softmax(-1), (logits[row].double() / temperature).softmax(-1))
    assert scores.amax(-1).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [1, 7, VOCAB - 1])
def test_top_k_equals_transformers(k: int) -> None:
    """Guards the count of kept tokens."""
    logits = logits_of(2)
    assert torch.equal(kept(logits, top_k=k), TopKLogitsWarper(k)(None, logits).isfinite())


@pytest.mark.parametrize("k", [0, VOCAB, VOCAB + 1, 1 << 31])
def test_top_k_of_the_whole_vocabulary_cuts_nothing(k: int) -> None:
    """Guards the ends of the range."""
    assert kept(logits_of(2), top_k=k).all()


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("guess", [4, 256, VOCAB])
def test_top_p_equals_transformers(monkeypatch: pytest.MonkeyPatch, p: float, guess: int) -> None:
    """Guards the nucleus, whether the first guess of its size suffices, a larger one, or only the whole row."""
    monkeypatch.setattr(token_draw, "FIRST_GUESS", guess)
    logits = logits_of(3)
    assert torch.equal(kept(logits, top_p=p), TopPLogitsWarper(p)(None, logits).isfinite())


@pytest.mark.parametrize("p", [0.001, 0.1, 1.0])
def test_min_p_equals_transformers(p: float) -> None:
    """Guards the threshold relative to the best token."""
    logits = logits_of(2)
    assert torch.equal(kept(logits, min_p=p), MinPLogitsWarper(p)(None, logits).isfinite())


def test_cuts_combine_as_in_transformers() -> None:
    """Guards the order temperature, min_p, top_k, top_p: top_p's share is of what the others leave."""
    logits = logits_of(4)
    wanted = TopPLogitsWarper(0.7)(None, TopKLogitsWarper(9)(None, MinPLogitsWarper(0.02)(None, logits / 1.7)))
    found = kept(logits, temperature=1.7, min_p=0.02, top_k=9, top_p=0.7)
    assert torch.equal(found, wanted.isfinite())
    assert found.sum().item() < kept(logits, temperature=1.7, min_p=0.02, top_k=9).sum().item()


def test_cuts_touch_only_the_rows_that_ask() -> None:
    """Guards ragged batches: each row gets its own k and p, off means untouched, wide ones do not widen others."""
    logits = logits_of(6)
    rows = [
        params(),
        params(top_k=3),
        params(top_p=0.5),
        params(top_k=200, top_p=0.9),
        params(top_k=VOCAB),
        params(top_k=300),
    ]
    scores = kept_scores(logits, rows)
    for row, own in enumerate(rows):
        assert torch.equal(scores[row], kept_scores(logits[row : row + 1], [own])[0])
    assert scores[0].isfinite().all()
    assert scores[1].isfinite().sum() == 3
    assert scores[4].isfinite().all()
    assert scores[5].isfinite().sum() == 300  # more than the first guess for top_p, which this row does not want


def test_ties_are_kept_together() -> None:
    """Guards determinism: which of two equal tokens survives must not depend on a sort."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert kept(logits, top_k=2).tolist() == [[False, True, True, True, False]]
    assert kept(logits, top_p=0.4).tolist() == [[False, True, True, True, False]]


def test_the_noise_of_a_key_never_changes() -> None:
    """Guards resumed requests across versions and devices: published SplitMix64 numbers, mapped to Gumbel."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    noise = gumbel_noise(np.array([1234567], dtype=np.uint64), 4, CPU)[0].tolist()
    assert noise == pytest.approx([-math.log(-math.log(((n >> 12) + 0.5) / 2**52)) for n in published], rel=1e-12)


def test_the_noise_is_gumbel() -> None:
    """Guards the distribution: mean, variance and quartiles, over tokens of a key and over keys of a token."""
    for noise in (gumbel_noise(keys_of(1), 200_000, CPU)[0], gumbel_noise(keys_of(20_000), 3, CPU)[:, 1]):
        assert noise.mean().item() == pytest.approx(0.5772, abs=0.04)
        assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.05)
        quartiles = [-math.log(-math.log(q)) for q in (0.25, 0.5, 0.75)]
        assert noise.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist() == pytest.approx(quartiles, abs=0.04)
        assert noise.isfinite().all()


def test_frequencies_follow_the_distribution() -> None:
    """Guards the whole chain statistically: chi-squared over 20,000 draws after top_k; cut tokens never come."""
    logits, count = logits_of(1, vocab=50), 20_000
    own = params(temperature=1.5, top_k=10)
    drawn = draw_tokens(logits.expand(count, -1), [own] * count, keys_of(count))
    wanted = kept_scores(logits, [own])[0].softmax(-1) * count
    seen = torch.bincount(drawn, minlength=50)
    assert seen[wanted == 0].sum() == 0
    assert ((seen - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum() < 27.9  # 9 degrees of freedom, p = 0.001


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    """Guards reproducibility: sixteen different rows drawn together, alone, and in reverse give the same tokens."""
    logits, keys = logits_of(16), keys_of(16)
    rows = [
        params(temperature=0.3 + i / 10, top_k=(i % 4) * 5, top_p=1.0 - (i % 3) / 10, min_p=(i % 2) / 100)
        for i in range(16)
    ]
    together = draw_tokens(logits, rows, keys).tolist()
    alone = [draw_tokens(logits[i : i + 1], rows[i : i + 1], keys[i : i + 1]).item() for i in range(16)]
    backwards = draw_tokens(logits.flip(0), rows[::-1], keys[::-1].copy()).tolist()
    assert together == alone == backwards[::-1]
    assert len(set(together)) > 8


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards large batches, which are drawn a few rows at a time."""
    logits, rows, keys = logits_of(7), [params(top_p=0.5 + i / 20) for i in range(7)], keys_of(7)
    whole = draw_tokens(logits, rows, keys).tolist()
    monkeypatch.setattr(token_draw, "CPU_SLICE", 2 * VOCAB)
    assert draw_tokens(logits, rows, keys).tolist() == whole


def test_rounding_errors_rarely_change_a_draw() -> None:
    """Guards resumes and other batch sizes, whose logits differ in the last bits (made coarse here): of these draws
    the best possible method changes 12, inverting the cumulative distribution 72."""
    count = 4000
    logits, keys = logits_of(1).expand(count, -1), keys_of(count)
    noise = 1e-2 * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(9))
    own = [params()] * count
    changed = (draw_tokens(logits, own, keys) != draw_tokens(logits + noise, own, keys)).sum().item()
    assert 0 < changed <= 20
