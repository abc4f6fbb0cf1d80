"""How the native library comes to be: compiled once, complete or absent, and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvbaton.kernels.draw import best_tokens
from kvbaton.kernels.native_build import NativeUnavailable, built_library
from kvbaton.kernels.native_lib import native_library

pytestmark = pytest.mark.process

BUILD = (
    "import ctypes, logging; logging.basicConfig(); from kvbaton.kernels.native_build import built_library as b; "
    "ctypes.CDLL(str(b())); print(b())"
)
SLOW_COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec echo 1.0
while [ "$1" != -o ]; do shift; done
head -c 5000 {library} > "$2"
touch {turns}/$$
while [ ! -e {go} ]; do sleep 0.05; done
tail -c +5001 {library} >> "$2"
"""


@dataclass(frozen=True, slots=True)
class Builders:
    """Processes that build with a compiler which stops halfway until `go` exists; each of its calls leaves a file in
    `turns`."""

    folder: Path
    turns: Path
    go: Path

    def start(self) -> subprocess.Popen[str]:
        env = os.environ | {"XDG_CACHE_HOME": str(self.folder), "CC": str(self.folder / "slow-cc")}
        return subprocess.Popen(
            [sys.executable, "-c", BUILD], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for_turn(self, count: int, builder: subprocess.Popen[str]) -> None:
        while len(list(self.turns.iterdir())) < count:
            assert builder.poll() is None
            time.sleep(0.02)


@pytest.fixture(autouse=True)
def _needs_library() -> None:
    if native_library() is None:
        pytest.skip("no native library here: see the log for the reason")


@pytest.fixture
def builders(tmp_path: Path) -> Iterator[Builders]:
    made = Builders(tmp_path, tmp_path / "turns", tmp_path / "go")
    made.turns.mkdir()
    compiler = tmp_path / "slow-cc"
    compiler.write_text(SLOW_COMPILER.format(turns=made.turns, go=made.go, library=built_library()))
    compiler.chmod(0o755)
    yield made
    made.go.touch()


def test_of_processes_that_start_together_one_compiles(builders: Builders) -> None:
    """Guards the lock and the rename. The second process starts while the first one's library is half written: it must
    say that it waits, compile nothing, load the whole library, and no other file may be left behind."""
    first = builders.start()
    builders.wait_for_turn(1, first)
    second = builders.start()
    assert second.stderr is not None
    assert "another process is compiling" in second.stderr.readline()
    builders.go.touch()
    paths = {process.communicate(timeout=300)[0].strip() for process in (first, second)}
    assert [first.returncode, second.returncode] == [0, 0]
    assert len(list(builders.turns.iterdir())) == 1
    assert {str(path) for path in (builders.folder / "kvbaton").iterdir()} == paths
    assert len(paths) == 1


def test_when_the_compiling_process_dies_a_waiting_one_compiles(builders: Builders) -> None:
    """Guards against a lock that outlives its holder, and against loading what the dead one had half written."""
    first = builders.start()
    builders.wait_for_turn(1, first)
    second = builders.start()
    assert second.stderr is not None
    assert "another process is compiling" in second.stderr.readline()
    first.kill()
    builders.wait_for_turn(2, second)
    builders.go.touch()
    path = second.communicate(timeout=300)[0].strip()
    assert second.returncode == 0
    assert Path(path).read_bytes() == built_library().read_bytes()
    first.communicate(timeout=300)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("KVBATON_NATIVE", "0", "KVBATON_NATIVE=0"),
        ("CC", "no-such-compiler", "no-such-compiler is not on the PATH; install"),
    ],
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
        "from kvbaton.engine.model.loader import load_model\n"
        "from kvbaton.engine.model.native_decoder import native_decoder\n"
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
