"""The regression guard: what counts as worse, and its exit status; the benchmarks themselves are not run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import guard
import pytest
from guard import Figure, Part, main, slack


@pytest.mark.parametrize(
    ("value", "more_is_better", "accepted", "gained"),
    [
        (1.2, True, 1.0, 0.2),
        (0.8, True, 1.0, -0.2),
        (0.8, False, 1.0, 0.2),
        (1.5, False, 1.0, -0.5),
        (0.0, False, 0.0, 0.0),
        (0.1, False, 0.0, -1.0),
    ],
)
def test_slack_is_positive_when_better(value: float, more_is_better: bool, accepted: float, gained: float) -> None:
    assert slack(Figure("x", value, more_is_better), accepted) == pytest.approx(gained)


def run(monkeypatch: pytest.MonkeyPatch, file: Path, speed: float, *options: str) -> int:
    """The guard over one real child process that writes `speed` as its result."""
    write = "import sys; open(sys.argv[2], 'w').write(sys.argv[3])"
    child = (sys.executable, "-c", f"import sys; sys.argv.append({str(speed)!r}); {write}")
    part = Part("part", child, lambda result: [Figure("speed over yardstick", float(result), True)])
    monkeypatch.setattr(guard, "PARTS", (part,))
    monkeypatch.setattr(sys, "argv", ["guard.py", "--file", str(file), *options])
    return main()


@pytest.mark.process
def test_it_fails_only_when_a_ratio_is_worse_than_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "accepted.json"
    assert run(monkeypatch, file, 1.0) == 0, "nothing accepted yet: nothing to be worse than"
    assert run(monkeypatch, file, 1.0, "--accept") == 0
    assert json.loads(file.read_text())["ratios"] == {"speed over yardstick": 1.0}
    assert run(monkeypatch, file, 0.8) == 0
    assert run(monkeypatch, file, 2.0) == 0
    capsys.readouterr()
    assert run(monkeypatch, file, 0.7) == 1
    shown = capsys.readouterr().out
    assert "WORSE" in shown
    assert "1 of 1 worse" in shown
    assert run(monkeypatch, file, 0.7, "--tolerance", "0.4") == 0
    assert run(monkeypatch, file, 0.7, "--accept") == 0
    assert run(monkeypatch, file, 0.6) == 0


@pytest.mark.process
def test_a_benchmark_that_fails_is_not_taken_for_a_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = Part("part", (sys.executable, "-c", "raise SystemExit('no')"), lambda result: [])
    monkeypatch.setattr(guard, "PARTS", (part,))
    monkeypatch.setattr(sys, "argv", ["guard.py", "--file", str(tmp_path / "none.json")])
    with pytest.raises(guard.subprocess.CalledProcessError):
        main()
