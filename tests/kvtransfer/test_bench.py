"""Guards the benchmark's own honesty: it measures what it says, through real processes, and writes what it printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("ucxx", reason="the ucxx package is not installed")

from kvbaton.kvtransfer import perftest
from kvbaton.kvtransfer.bench import main

pytestmark = pytest.mark.ucx


def test_a_small_run_reports_each_size_with_both_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--sizes", "65536", "--tls", "all", "--rounds", "1", "--megabytes", "4", "--checksum", "xxh3"]
    arguments += ["--json", str(out)]
    assert main(arguments) == 0
    written = json.loads(out.read_text())
    assert written["command"] == "kvbaton bench transfer " + " ".join(arguments)
    (row,) = written["rows"]
    assert (row["tls"], row["block_bytes"]) == ("all", 65536)
    assert row["ratio"] == pytest.approx(row["handoff_gb_s"] / row["perftest_gb_s"])
    assert row["one_block_us"] > 0
    assert row["checksum"] == "xxh3"
    assert "memory" in row["transports"]
    assert "64 KiB" in capsys.readouterr().out


def test_perftests_result_line_is_read_by_column() -> None:
    line = "   200   5.288   45.280   45.280   1380.29   1391.50   22085   22085"
    assert perftest.overall_bandwidth("header\n" + line + "\n", "") == 1391.50e6
    with pytest.raises(perftest.PerftestError, match="no such transport"):
        perftest.overall_bandwidth("", "no such transport")
