"""How the native library comes to be: compiled once, complete or absent, and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvbaton.kernels.argmax import best_tokens
from kvbaton.kernels.native_build import NativeUnavailable, built_library
from kvbaton.kernels.native_lib import native_library

BUILD = "import ctypes; from kvbaton.kernels.native_build import built_library as b; ctypes.CDLL(str(b())); print(b())"
SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec echo 1.0
while [ "$1" != -o ]; do shift; done
head -c 5000 {library} > "$2"
touch {turns}/$$
while [ "$(ls {turns} | wc -l)" -lt 2 ]; do sleep 0.05; done
tail -c +5001 {library} >> "$2"
"""


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    if native_library() is None:
        pytest.skip("no native library here: see the log for the reason")


def test_processes_that_start_together_share_one_library(tmp_path: Path) -> None:
    """Guards the rename: a half-written library loaded by another process, or files left behind. The compiler here
    writes its output, the real library, in two parts, and waits between them until all processes are at it."""
    compiler, turns = tmp_path / "slow-cc", tmp_path / "turns"
    turns.mkdir()
    compiler.write_text(SLOW_COMPILER.format(turns=turns, library=built_library()))
    compiler.chmod(0o755)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CC": str(compiler)}
    started = [subprocess.Popen([sys.executable, "-c", BUILD], env=env, stdout=subprocess.PIPE) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].decode().strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert {str(path) for path in (tmp_path / "kvbaton").iterdir()} == paths
    assert len(paths) == 1


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("KVBATON_NATIVE", "0", "KVBATON_NATIVE=0"), ("CC", "no-such-compiler", "is not on the PATH")],
)
def test_a_machine_without_a_compiler_is_told_why(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(NativeUnavailable, match=reason):
        built_library()


def test_a_failing_compiler_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards against a broken file under the library's name, which every later start would load."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec echo 1.0\necho "no such instruction" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(NativeUnavailable, match="no such instruction"):
        built_library()
    assert list((tmp_path / "cache" / "kvbaton").iterdir()) == []


def test_without_the_library_the_engine_runs_on_torch(tmp_path: Path) -> None:
    """Guards the fallback: same greedy tokens with and without native code, and one notice in the log."""
    script = (
        "import logging, sys, torch; logging.basicConfig(); torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from kvbaton.engine.tiny import TinySpec, make_tiny, probe_prompts\n"
        "from kvbaton.engine.model_loader import load_model\n"
        "from kvbaton.engine.native_decoder import native_decoder\n"
        "from kvbaton.engine.greedy import generate\n"
        "folder = Path(sys.argv[1])\n"
        "(folder / 'config.json').exists() or make_tiny(folder, TinySpec(check=False))\n"
        "decoder = native_decoder(load_model(folder, torch.device('cpu')).decoder)\n"
        "print(type(decoder).__name__, [r.tokens for r in generate(decoder, probe_prompts()[:3], 8)])\n"
    )
    results = []
    for switch in ("1", "0"):
        env = os.environ | {"KVBATON_NATIVE": switch}
        command = [sys.executable, "-c", script, str(tmp_path / "model")]
        results.append(subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300))
    (native, native_tokens), (plain, plain_tokens) = (r.stdout.split(" ", 1) for r in results)
    assert (native, plain) == ("NativeDecoder", "Decoder")
    assert native_tokens == plain_tokens
    assert [r.stderr.count("fall back to plain PyTorch") for r in results] == [0, 1]


@pytest.mark.parametrize("width", [1, 3, 16, 63, 64, 65, 1000, 32003])
def test_argmax_is_torchs(width: int) -> None:
    """The first of equal values, NaN before all, -inf everywhere: as torch, in whole vectors and in their rest."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(-4, 4, (6, width), generator=generator).float()
    logits[1] = float("-inf")
    logits[2, width // 2] = float("nan")
    logits[3, -1] = 9.0
    logits[4, 0] = float("inf")
    assert torch.equal(best_tokens(logits), logits.argmax(-1))
    assert torch.equal(best_tokens(logits[:, : width // 2 + 1]), logits[:, : width // 2 + 1].argmax(-1))
