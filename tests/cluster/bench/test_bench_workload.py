"""What is sent and when: lengths, arrivals, prompts, traces. All of it must follow from the seed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from kvbaton.cluster.bench.lengths import Choice, Fixed, LengthError, Lognormal, Normal, Uniform, parse_lengths
from kvbaton.cluster.bench.options import PrefixSharing
from kvbaton.cluster.bench.traces import TraceEntry, TraceError, read_trace
from kvbaton.cluster.bench.workload import (
    Kind,
    PromptTokens,
    Segment,
    poisson_arrivals,
    random_requests,
    trace_arrivals,
    trace_requests,
    warmup_request,
)

TRACES = Path(__file__).resolve().parents[4] / "shared" / "traces"


# --- lengths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("128", Fixed(128)),
        ("64:256", Uniform(64, 256)),
        ("normal:512,128", Normal(512, 128)),
        ("lognormal:512,1.5", Lognormal(512, 1.5)),
        ("choice:16,2048", Choice((16, 2048))),
    ],
)
def test_length_forms_parse(text: str, expected: object) -> None:
    """Guards the documented forms of --input-tokens."""
    assert parse_lengths(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "256:64", "0:8", "normal:1", "zipf:1,2", "choice:1,2.5", "", "a", "1:"])
def test_length_that_cannot_be_is_refused(text: str) -> None:
    """Guards against a typing error that silently measures another load."""
    with pytest.raises(LengthError, match=f"^length '{text}'"):
        parse_lengths(text)


@pytest.mark.parametrize("text", ["3", "1:4", "normal:2,50", "lognormal:1,3", "choice:1,9"])
def test_every_length_is_at_least_one(text: str) -> None:
    """Guards the wide distributions, whose raw draws are often zero or negative."""
    rng = np.random.default_rng(0)
    lengths = parse_lengths(text)
    assert min(lengths.draw(rng) for _ in range(500)) >= 1


def test_uniform_reaches_both_ends() -> None:
    """Guards the off-by-one of an excluded upper end."""
    rng = np.random.default_rng(0)
    assert {Uniform(2, 4).draw(rng) for _ in range(200)} == {2, 3, 4}


# --- arrivals


def test_poisson_rate_and_variation() -> None:
    """Guards the scale of the gamma draw: a rate off by its shape measures the wrong load."""
    for burstiness, variation in ((1.0, 1.0), (0.25, 2.0), (4.0, 0.5)):
        times = list(itertools.islice(poisson_arrivals(20.0, seed=3, burstiness=burstiness), 20_000))
        gaps = np.diff(times)
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)
        assert (gaps >= 0).all()


def test_arrivals_follow_from_the_seed() -> None:
    """Guards reproducibility: same seed same times, another seed others."""
    first, again, other = (list(itertools.islice(poisson_arrivals(5, seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_trace_arrivals_scale_and_jitter() -> None:
    """Guards --speed (twice as fast is half the time) and --jitter (later only, in trace time, still sorted)."""
    entries = [TraceEntry(moment, 8, 8) for moment in (0.0, 3.0, 3.0, 6.0)]
    assert trace_arrivals(entries, 2.0, 0.0, seed=0) == [0.0, 1.5, 1.5, 3.0]
    moved = trace_arrivals(entries, 1.0, 3.0, seed=0)
    assert moved == sorted(moved)
    assert all(entry.arrival_s <= time < entry.arrival_s + 3.0 for entry, time in zip(entries, moved, strict=True))
    assert moved[1] != moved[2]


# --- prompts


def test_equal_segments_are_equal_tokens_and_others_differ() -> None:
    """Guards prefix sharing: what the plan calls the same prefix must be the same ids, and nothing else may be."""
    prompts = PromptTokens(range(1000), seed=5)
    shared = Segment(Kind.GROUP, 1, 40)
    first = prompts.tokens((shared, Segment(Kind.OWN, 0, 20)))
    second = prompts.tokens((shared, Segment(Kind.OWN, 1, 30)))
    assert first.shape == (60,)
    assert second.shape == (70,)
    assert first[:40].tolist() == second[:40].tolist()
    assert first[40:].tolist() != second[40:60].tolist()


def test_a_shorter_segment_is_a_prefix_of_the_longer() -> None:
    """Guards partial last blocks of a trace: they must share as far as they reach."""
    prompts = PromptTokens(range(1000), seed=5)
    long = prompts.tokens((Segment(Kind.BLOCK, 9, 512),))
    short = prompts.tokens((Segment(Kind.BLOCK, 9, 100),))
    assert long[:100].tolist() == short.tolist()


def test_kinds_and_seeds_are_different_streams() -> None:
    """Guards against a warm-up that fills the prefix cache with the measured prompts."""
    prompts = PromptTokens(range(1000), seed=5)
    rows = [prompts.tokens((Segment(kind, 0, 30),)).tolist() for kind in Kind]
    rows.append(PromptTokens(range(1000), seed=6).tokens((Segment(Kind.OWN, 0, 30),)).tolist())
    assert len({tuple(row) for row in rows}) == len(Kind) + 1


def test_only_ids_of_the_vocabulary_are_used() -> None:
    """Guards against ids that the model refuses."""
    tokens = PromptTokens([7, 11, 13], seed=0).tokens((Segment(Kind.OWN, 0, 200),))
    assert set(tokens.tolist()) == {7, 11, 13}


def test_random_requests_share_prefixes_by_group() -> None:
    """Guards --prefix-tokens: the prefix comes on top, its group is one of G, and all groups occur."""
    requests = list(itertools.islice(random_requests(Fixed(16), Uniform(1, 9), PrefixSharing(64, 3), seed=0), 60))
    assert [request.index for request in requests] == list(range(60))
    assert {request.input_tokens for request in requests} == {80}
    assert {request.segments[0] for request in requests} == {Segment(Kind.GROUP, group, 64) for group in range(3)}
    assert len({request.segments[1].key for request in requests}) == 60


def test_random_requests_without_sharing_have_no_common_prefix() -> None:
    """Guards the default: a benchmark without --prefix-tokens must not hit the prefix cache."""
    prompts = PromptTokens(range(500), seed=0)
    requests = itertools.islice(random_requests(Fixed(16), Fixed(4), PrefixSharing(), seed=0), 50)
    starts = {tuple(prompts.tokens(request.segments)[:8].tolist()) for request in requests}
    assert len(starts) == 50


def test_lengths_do_not_move_when_sharing_is_switched_on() -> None:
    """Guards comparability: the same seed with and without a shared prefix draws the same lengths."""
    plain, shared = (
        list(itertools.islice(random_requests(Uniform(1, 99), Uniform(1, 99), sharing, seed=4), 30))
        for sharing in (PrefixSharing(), PrefixSharing(32, 4))
    )
    assert [r.output_tokens for r in plain] == [r.output_tokens for r in shared]
    assert [r.input_tokens + 32 for r in plain] == [r.input_tokens for r in shared]


def test_warmup_shares_no_stream_with_the_run() -> None:
    """Guards against a warm-up that shortens the first measured prefill."""
    assert {segment.kind for segment in warmup_request(0, 8, 32).segments} == {Kind.WARMUP}


# --- traces


def mooncake(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_mooncake_lines_become_entries(tmp_path: Path) -> None:
    """Guards units (milliseconds), the origin (first request), the order and the limit."""
    path = mooncake(
        tmp_path,
        '{"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
        '{"timestamp": 1000, "input_length": 10, "output_length": 0, "hash_ids": [2]}',
        '{"timestamp": 9000, "input_length": 10, "output_length": 7, "hash_ids": [3]}',
    )
    assert read_trace(path, limit=2) == [TraceEntry(0.0, 10, 1, (2,)), TraceEntry(2.0, 600, 5, (0, 1))]


def test_azure_rows_become_entries(tmp_path: Path) -> None:
    """Guards the seven-digit fraction and the columns' meaning."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:18:03.9799607,3180,8\n"
    )
    first, second = read_trace(path)
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.arrival_s == pytest.approx(60.0000007, abs=2e-7)
    assert second.hash_ids == ()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"timestamp": 1}\n', "line 1: not a Mooncake request"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 1, "output_length": 1}\nnonsense\n', "line 2"),
        ("a.jsonl", '{"timestamp": 0, "input_length": -5, "output_length": 1}\n', "negative token count -5"),
        ("a.jsonl", "\n", "no requests in it"),
        ("a.csv", "when,ContextTokens,GeneratedTokens\n1,2,3\n", "no column TIMESTAMP"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,2,3\n", "line 2: not an Azure request"),
        ("a.txt", "", "a trace is a Mooncake .jsonl or an Azure .csv file"),
    ],
)
def test_a_bad_trace_names_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    """Guards against a stack trace, or a silent skip, for a damaged file."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    """Guards the commonest mistake, a wrong path."""
    with pytest.raises(TraceError, match=r"cannot read the trace .*gone\.jsonl: No such file"):
        read_trace(tmp_path / "gone.jsonl")


def test_hash_ids_become_shared_blocks() -> None:
    """Guards the Mooncake rule: prompts share exactly as far as their ids agree, at any length scale."""
    entries = [TraceEntry(0.0, 1500, 10, (0, 7, 8)), TraceEntry(0.0, 1024, 10, (0, 9))]
    prompts = PromptTokens(range(1000), seed=0)
    for scale, block in ((1.0, 512), (0.1, 51)):
        first, second = (prompts.tokens(request.segments).tolist() for request in trace_requests(entries, scale))
        assert len(first) == round(1500 * scale)
        assert len(second) == round(1024 * scale)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
        assert shared == block


def test_a_trace_without_ids_gets_prompts_of_its_own() -> None:
    """Guards Azure traces: lengths kept, nothing shared."""
    first, second = trace_requests([TraceEntry(0.0, 300, 9), TraceEntry(0.0, 300, 9)], 1.0)
    assert first.segments == (Segment(Kind.OWN, 0, 300),)
    assert second.segments == (Segment(Kind.OWN, 1, 300),)


def test_length_scale_never_gives_an_empty_request() -> None:
    """Guards tiny scales: the server refuses an empty prompt."""
    (request,) = trace_requests([TraceEntry(0.0, 20, 3, (4,))], 0.001)
    assert (request.input_tokens, request.output_tokens) == (1, 1)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "count", "mean_input", "mean_output"),
    [
        ("mooncake_conversation_trace.jsonl", 12_031, 12_035, 343),
        ("mooncake_synthetic_trace.jsonl", 3_993, 15_325, 149),
        ("AzureLLMInferenceTrace_code.csv", 8_819, 2_048, 28),
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 1_155, 211),
    ],
)
def test_public_traces_read_to_their_published_means(name: str, count: int, mean_input: int, mean_output: int) -> None:
    """Guards the readers against the real files (not part of this repository)."""
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"{path} is absent: public traces are not part of this repository")
    entries = read_trace(path)
    assert len(entries) == count
    assert sum(e.input_tokens for e in entries) / count == pytest.approx(mean_input, abs=1)
    assert sum(e.output_tokens for e in entries) / count == pytest.approx(mean_output, abs=1)
    assert all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(entries))
