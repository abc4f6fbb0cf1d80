"""Guards that the time model follows what is observed, and that one odd observation does not lead it astray."""

from __future__ import annotations

import pytest

from kvbaton.router.time_model import TimeModel


def test_predictions_are_linear_in_tokens_and_sequences() -> None:
    times = TimeModel(prefill_s_per_token=0.001, decode_step_s=0.02, step_per_sequence_s=0.001)
    assert times.prefill_s(300) == pytest.approx(0.3)
    assert times.step_s(5) == pytest.approx(0.025)


def test_rates_converge_to_what_is_seen() -> None:
    times = TimeModel(prefill_s_per_token=0.001, decode_step_s=0.02, step_per_sequence_s=0.001)
    for _ in range(60):
        times.observe_prefill(1000, 0.1)
        times.observe_step(10, 0.06)
    assert times.prefill_s(1000) == pytest.approx(0.1, rel=0.01)
    assert times.step_s(10) == pytest.approx(0.06, rel=0.01)


def test_one_observation_moves_a_fifth_of_the_way() -> None:
    times = TimeModel(prefill_s_per_token=0.001)
    times.observe_prefill(1000, 2.0)
    assert times.prefill_s_per_token == pytest.approx(0.0012)


def test_short_prompt_says_little() -> None:
    times = TimeModel(prefill_s_per_token=0.001)
    times.observe_prefill(16, 0.032)
    assert times.prefill_s_per_token == pytest.approx(0.001 * (1 + 0.2 * 16 / 256))


def test_a_stall_counts_as_eight_times_at_most() -> None:
    times = TimeModel(prefill_s_per_token=0.001)
    times.observe_prefill(1000, 3600.0)
    assert times.prefill_s_per_token == pytest.approx(0.001 + 0.2 * 0.007)


@pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (10, 0.0), (-3, 1.0)])
def test_empty_observations_are_ignored(tokens: int, seconds: float) -> None:
    times = TimeModel()
    times.observe_prefill(tokens, seconds)
    times.observe_step(tokens, seconds)
    assert times == TimeModel()
