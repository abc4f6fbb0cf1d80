"""The GPU check on a machine without a GPU: arithmetic of the floors, the harness, the report, the exit status."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_check
import pytest
import torch
from gpucheck import checks, floors, isolation, parts
from gpucheck.checks import Bench, Check, CheckResult, Outcome, kernel_checks, run_check
from gpucheck.floors import Ceilings, decode_floor_s, decode_goal, kv_bytes, models, prefill_flop, weight_bytes
from gpucheck.model_checks import PROMPTS, small_config
from gpucheck.parts import Options
from gpucheck.report import Report
from gpucheck.results import BlockResult, DecodeResult, PrefillResult, Skipped
from gpucheck.rig import Rig

from kvbaton.engine.greedy import generate
from kvbaton.engine.model.loader import random_model
from kvbaton.kernels.cpu import CpuKernels
from support import gpu_parts

CPU = torch.device("cpu")
STEP = DecodeResult("m", 32, 1024, 4e-3, 3e-3, 1.15, 3.5e-3, 2e-3, 1e-3, 0.4e-3, 1.0)


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, CpuKernels(), torch.Generator().manual_seed(1))


def test_model_shapes_have_the_published_sizes() -> None:
    """A wrong shape would make every floor, and every claim against it, wrong."""
    billions = {}
    for name, config in models().items():
        tied = config.tie_word_embeddings
        embeddings = config.vocab_size * config.hidden_size * (1 if tied else 2)
        billions[name] = round((floors.matmul_params(config) + embeddings) / 1e9, 2)
    assert billions == {"Qwen3-0.6B": 0.6, "Llama-3-8B": 8.03, "Qwen3-8B": 8.19}
    assert kv_bytes(models()["Qwen3-8B"], 1, 1, 2) == 147456


def test_floors_by_hand() -> None:
    """Guards units and factors of two, on sizes small enough to count."""
    config = replace(
        models()["Llama-3-8B"], vocab_size=10, hidden_size=4, intermediate_size=6, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=3, sliding_windows=(None, None),
    )  # fmt: skip
    layer = 4 * (6 + 3 + 3 + 6) + 3 * 4 * 6  # q, k, v, out; gate, up, down
    assert floors.matmul_params(config) == 2 * layer
    assert weight_bytes(config, 2) == 2 * (2 * layer + 40)
    kv = 5 * 100 * 2 * 2 * 3  # batch, context, layers, K and V, head_dim
    assert decode_floor_s(config, 5, 100, 1, Ceilings(1e3, 1.0)) == pytest.approx((weight_bytes(config, 2) + kv) / 1e3)
    halved = decode_floor_s(config, 5, 100, 1, Ceilings(1e3, 1.0), weight_itemsize=1)
    assert halved == pytest.approx((weight_bytes(config, 2) / 2 + kv) / 1e3)
    attention = 2 * 2 * 7 * 7 * 6 // 2 * 2  # two products of 2 * 7 * 7 * q_size, half of them, two layers
    assert prefill_flop(config, 7) == 2 * 2 * layer * 7 + attention + 2 * 10 * 4
    assert [decode_goal(batch) for batch in (1, 8, 32, 256)] == [1.3, 1.3, 1.15, 1.15]


@pytest.mark.parametrize("check", list(kernel_checks(tiny=True)), ids=lambda check: check.name)
def test_right_kernels_pass(bench: Bench, check: Check) -> None:
    result = run_check(check, bench)
    assert result.passed, result


class Lazy(CpuKernels):
    """Leaves the last row of its output as it found it."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        out[:-1] = super().rms_norm(x, weight, eps)[:-1]
        return out


class Greedy(CpuKernels):
    """Writes one slot too many."""

    def rope_and_write_kv(self, q, k, v, cos, sin, kv_cache, layer, meta):  # type: ignore[no-untyped-def]
        out = super().rope_and_write_kv(q, k, v, cos, sin, kv_cache, layer, meta)
        kv_cache[0, 0, 0, 0, 0, 0] = 1.0
        return out


class Blind(CpuKernels):
    """Does not see a sequence's first block."""

    def paged_attention(self, q, kv_cache, layer, meta, scale, sliding_window):  # type: ignore[no-untyped-def]
        shifted = replace(meta, block_tables=meta.block_tables.roll(1, 1))
        return super().paged_attention(q, kv_cache, layer, shifted, scale, sliding_window)


class Broken(CpuKernels):
    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("kernels", "name"),
    [(Lazy, "norms"), (Greedy, "rope"), (Blind, "mixed"), (Blind, "decode attention"), (Broken, "silu")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_wrong_kernels_fail(bench: Bench, kernels: type[CpuKernels], name: str) -> None:
    """A check that cannot fail guards nothing: outputs left out, stray writes, wrong blocks and errors are found."""
    found = next(check for check in kernel_checks(tiny=True) if check.name.startswith(name))
    result = run_check(found, replace(bench, kernels=kernels()))
    assert not result.passed
    assert (result.problem is not None) == (kernels is Broken)


def test_nan_is_never_within_a_limit() -> None:
    assert not CheckResult("c", math.nan, 1.0, 0.0).passed
    assert math.isnan(checks.distance(torch.tensor([math.nan]), torch.tensor([1.0])))
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_small_model_has_clear_winners() -> None:
    """The device's tokens are compared with the CPU's: a near tie would fail on rounding alone."""
    decoder = random_model(small_config(), 3, CPU, "float32").decoder
    assert min(generate(decoder, [prompt], 16)[0].smallest_gap for prompt in PROMPTS) > 0.01


def test_report_counts_and_marks() -> None:
    """Guards derived numbers and marks, in the table and in the JSON."""
    report = Report("cmd", {"device": "NVIDIA H200"}, 7, ceilings=Ceilings(4e12, 7e14))
    report.decode.append(STEP)
    report.prefill.append(PrefillResult("m", 8192, 4096, 2.0, 10**15, 1.4, 0.6))
    report.blocks.append(BlockResult("m", 1 << 20, 8 * 10**9, 4e-3, 4e12))
    report.checks.append(CheckResult("good", 0.0, 0.0, 0.1))
    report.skipped.append(Skipped("m decode 256 x 4096", "137 GB of KV do not fit"))
    text = report.markdown()
    assert (
        "| m | 32 | 1024 | 4.000 | 3.000 | 1.33 | 1.15 | **no** | 3.500 | 2.000 | 1.000 | 0.400 | 0.600 | 8000 |"
        in text
    )
    assert "| m | 8192 | 4096 | 2000.000 | 500.0 | 70% | 60% | yes |" in text
    assert "| m | 1048576 | 2000 | 50% | **no** |" in text
    assert "- not measured: m decode 256 x 4096: 137 GB of KV do not fit" in text
    assert "finished: no: cut short" in text
    assert "not run on a GPU" not in text
    values = json.loads(report.json())
    assert values["decode"][0]["over_floor"] == pytest.approx(4 / 3)
    assert values["passed"] is True


def test_a_failed_check_or_section_fails_the_run() -> None:
    report = Report("cmd", {"device": "cpu"}, 7)
    assert report.passed
    report.problems.append(Skipped("ceilings", "Traceback ..."))
    assert not report.passed
    report.problems.clear()
    report.checks.append(CheckResult("bad", math.inf, 0.0, 0.1, "stray bytes", None))
    assert not report.passed
    assert "| bad | inf | 0e+00 | **FAILED** | stray bytes |" in report.markdown()
    assert "not run on a GPU" in report.markdown()
    assert json.loads(report.json())["checks"][0]["error"] == "inf"


def test_a_pool_that_is_too_small_is_said_so() -> None:
    """Batches that do not fit must be left out, not run over each other's blocks."""
    rig = Rig(small_config(), CPU, None, 200)
    rows = rig.decode_rows(3, 40)
    assert rows is not None
    held = [block for row in rows for block in row.seq.block_table]
    assert len(set(held)) == len(held)
    assert rig.decode_rows(5, 40) is None
    rig.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_figures_of_a_cpu_are_not_asked_for_by_chance(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(["--device", "cpu"])
    assert "add --self-test" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_program_at_tiny_shapes(tmp_path: Path) -> None:
    """Every section runs to its end and is in both files."""
    assert gpu_check.main(["--device", "cpu", "--self-test", "--seed", "5", "--out", str(tmp_path)]) == 0
    values = json.loads((tmp_path / "gpu_check.json").read_text())
    assert values["finished"]
    assert values["seed"] == 5
    assert not values["problems"]
    assert len(values["blocks"]) == 1
    assert [row["batch"] for row in values["decode"]] == [1, 8]
    assert [row["batch"] for row in values["overlap"]] == [1, 8]
    assert all(row["alone_gap_s"] == row["alone_s"] - row["device_s"] for row in values["overlap"])
    assert len(values["draws"]) == 3
    assert [row["num_bytes"] > 0 and row["eight_billion_s"] > 0 for row in values["load"]] == [True]
    assert values["checks"][-1]["name"] == "weights loaded = saved"
    assert "not run on a GPU" in (tmp_path / "gpu_check.md").read_text()


def found_of(name: str, part: isolation.Part, device: torch.device = CPU, silence_s: float = 60.0) -> list[str]:
    """Names of what was found, and the message of what ended it."""
    names = []
    try:
        for _, value in isolation.isolated(name, Options(device, 1), time.monotonic() + 120.0, silence_s, part):
            assert isinstance(value, CheckResult)
            names.append(value.name)
    except isolation.PartFailed as error:
        return [*names, str(error).strip().splitlines()[-1]]
    return names


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("raises", "ValueError: no such shape"),
        ("crashes", "its process ended with status -11"),
    ],
)
def test_a_part_that_ends_badly_leaves_what_it_found(name: str, end: str) -> None:
    """A fault of a kernel ends a process: the program must live, and say so."""
    assert found_of(name, gpu_parts.ends_badly) == ["c0", end]


@pytest.mark.process
def test_a_part_that_hangs_is_ended() -> None:
    """A kernel that never returns must not take the time of all the others."""
    assert found_of("hangs", gpu_parts.ends_badly, silence_s=5.0)[-1] == "nothing came for 5 s"
    with pytest.raises(isolation.OutOfTime):
        list(isolation.isolated("hangs", Options(CPU, 1), time.monotonic() - 1.0, part=gpu_parts.ends_badly))
    assert not multiprocessing.active_children()


@pytest.mark.process
def test_checks_go_on_behind_one_that_breaks_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that ended its process has failed; one whose device is lost is counted once; all others are done."""
    names = [Check(f"c{number}", lambda bench: Outcome(0.0, 0.0)) for number in range(5)]
    monkeypatch.setattr(gpu_check, "all_checks", lambda tiny: names)
    monkeypatch.setattr(gpu_check, "isolated", partial(isolation.isolated, part=gpu_parts.checks_with_faults))
    args = gpu_check.parse(["--device", "cpu", "--self-test", "--out", str(tmp_path)])
    session = gpu_check.Session(args, gpu_parts.LOST, isolated=True)
    session.part(parts.CHECKS)
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert [(row["name"], row["passed"]) for row in rows] == [
        ("c0", True), ("c1", False), ("c2", True), ("c3", False), ("c4", True),
    ]  # fmt: skip
    assert rows[1]["problem"] == "its process ended with status 9"
    assert not session.report.problems


@pytest.mark.slow
def test_decode_steps_with_eight_bit_weights() -> None:
    """The option measures another model against another floor: half of the bytes, and the products that read them."""
    options = Options(CPU, 1, tiny=True, quantization="int8", ceilings=Ceilings(1e9, 1e9))
    found = [value for field, value in parts.run_part("tiny", options) if field == "decode"]
    config = small_config()
    wanted = [decode_floor_s(config, batch, 40, 4, Ceilings(1e9, 1e9), weight_itemsize=1) for batch in (1, 8)]
    assert [value.floor_s for value in found] == pytest.approx(wanted)  # type: ignore[attr-defined]


def test_no_section_begins_after_the_budget(tmp_path: Path) -> None:
    """A machine lent for ten minutes is taken back: what is left out must be named, and nothing lost."""
    arguments = ["--device", "cpu", "--self-test", "--checks-only", "--budget-s", "-1", "--out", str(tmp_path)]
    assert gpu_check.main(arguments) == 0
    values = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [item["what"] for item in values["skipped"]] == ["checks against float64"]
    assert not values["checks"]


def test_a_failing_check_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Check("wrong", lambda bench: Outcome(1.0, 0.5))
    for module in (gpu_check, parts):
        monkeypatch.setattr(module, "all_checks", lambda tiny: [wrong])
    arguments = ["--device", "cpu", "--self-test", "--checks-only", "--out", str(tmp_path)]
    assert gpu_check.main(arguments) == 1
    assert [row["name"] for row in json.loads((tmp_path / "gpu_check.json").read_text())["checks"]] == ["wrong"]
