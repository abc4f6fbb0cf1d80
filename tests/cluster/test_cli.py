"""The command line: what each word leads to, what wrong ones say, and what is not imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvbaton
from kvbaton.cluster import cli
from kvbaton.cluster.config.cluster_config import (
    ClusterConfig,
    HostingConfig,
    HttpConfig,
    PoolsConfig,
    RayConfig,
    StoreConfig,
)
from kvbaton.cluster.config.config_file import load_config
from kvbaton.cluster.config.flags import FLAGS
from kvbaton.cluster.launch import serve_command
from kvbaton.engine.config import CacheConfig, EngineConfig
from kvbaton.kvtransfer.config import TransferConfig


def exit_status(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.process
def test_version_needs_only_the_standard_library() -> None:
    """Guards start-up time and `kvbaton --version` in an environment where nothing is installed."""
    code = "import sys; from kvbaton.cluster import cli; cli.main(['--version'])"
    heavy = "ray torch yaml redis rich psutil numpy"
    check = f"import sys; bad = [m for m in {heavy.split()!r} if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    script = f"try:\n    exec({code!r})\nexcept SystemExit:\n    pass\n{check}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, f"kvbaton {kvbaton.__version__}"), result.stderr


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status() == 2
    output = capsys.readouterr().out
    for name in ("serve", "config", "bench", "make-model", "env"):
        assert f"  {name} " in output


@pytest.mark.process
def test_ctrl_c_during_the_imports_of_a_command_ends_with_one_line(tmp_path: Path) -> None:
    """Guards against a page of traceback when the user changes their mind in the first second."""
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    command = ["-c", "import sys; from kvbaton.cluster import cli; sys.exit(cli.main(['serve']))"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("sevre") == 2
    assert "invalid choice: 'sevre'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port: must be from 0 to 65535, got 99999"),
        (["--dtype", "fp16"], "--dtype: must be one of auto, float32, bfloat16, float16, got 'fp16'"),
        (["--prefill", "0"], "no engine can prefill; set --prefill 1, or --hybrid 1"),
        (["--kv-memory", "much"], "--kv-memory: expected a size such as 512MiB or 2GiB, got 'much'"),
        (["--config", "/no/such.yaml"], "cannot read /no/such.yaml: No such file or directory"),
    ],
)
def test_serve_refuses_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("serve", *arguments) == 2
    assert message in capsys.readouterr().out


def test_every_flag_reaches_its_setting() -> None:
    """Guards the table of flags: a path that does not exist would be refused as an unknown setting."""
    given = {
        "--model": "/m",
        "--served-model-name": "tiny",
        "--dtype": "float16",
        "--quantization": "int8",
        "--max-model-len": "99",
        "--prefill": "2",
        "--decode": "3",
        "--hybrid": "4",
        "--device": "cuda",
        "--gpus-per-engine": "0.5",
        "--kv-memory": "2GiB",
        "--block-size": "64",
        "--threads": "6",
        "--host": "::1",
        "--port": "7",
        "--replicas": "8",
        "--redis": "redis://r",
        "--address": "r:1",
        "--ucx-tls": "tcp",
        "--log-level": "info",
    }
    assert given.keys() == FLAGS.keys()
    path, overrides = serve_command.parse([part for item in given.items() for part in item])
    assert path is None
    assert load_config(None, overrides) == ClusterConfig(
        PoolsConfig(2, 3, 4),
        HostingConfig("cuda", 0.5),
        EngineConfig(Path("/m"), "cpu", "float16", 99, 6, CacheConfig(64, 2 << 30), quantization="int8"),
        TransferConfig("tcp"),
        http=HttpConfig("tiny", "::1", 7, 8),
        store=StoreConfig("redis://r"),
        ray=RayConfig("r:1", log_level="info"),
    )


def test_flags_that_are_not_given_change_nothing() -> None:
    assert serve_command.parse([]) == (None, [])


def test_config_prints_a_file_that_serve_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards the way to a file of one's own: print, edit, check."""
    assert exit_status("config") == 0
    written = tmp_path / "cluster.yaml"
    written.write_text(capsys.readouterr().out)
    assert load_config(written) == ClusterConfig()
    assert exit_status("config", "--check", str(written)) == 0
    written.write_text("http: {prot: 80}")
    assert exit_status("config", "--check", str(written)) == 2
    assert capsys.readouterr().err == f"error: {written}: http.prot: unknown setting; did you mean 'port'?\n"


@pytest.mark.process
def test_env_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("env") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if len(line.split()) > 1)
    assert lines["kvbaton"] == kvbaton.__version__
    assert lines["torch"] != "not installed"


def test_make_model_says_in_one_line_that_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback for a path that goes through a file."""
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "model"
    assert exit_status("make-model", str(out)) == cli.EXIT_FAILED
    assert capsys.readouterr().err == f"error: cannot write {out}: Not a directory\n"


def test_make_model_helps_under_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status("make-model", "--help")
    assert capsys.readouterr().out.startswith("usage: kvbaton make-model ")
