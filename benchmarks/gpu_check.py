"""Is every kernel right on this GPU, and how far from the hardware is each step? One command, one report.

    PYTHONPATH=src python benchmarks/gpu_check.py --out results            # at most ten minutes
    PYTHONPATH=src python benchmarks/gpu_check.py --out results --quick    # one model, fewer sizes
    PYTHONPATH=src python benchmarks/gpu_check.py --device cpu --self-test # tries the program out, without a GPU

With TRITON_INTERPRET=1 before the last one the checks are of Triton's kernels, in its interpreter.

Needs torch, triton, transformers' dependencies and this repository; no network, no Ray, no Redis. Writes
gpu_check.json and gpu_check.md to the folder of --out after every section, so that a run cut short leaves what it had.

Exit status: 0 every check passed; 1 one failed; 2 there is no GPU. Missed goals are reported and change nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import torch
from gpucheck import floors, speed, split
from gpucheck.checks import Bench, CheckResult, kernel_checks, run_check
from gpucheck.model_checks import model_checks, small_config
from gpucheck.overlap import overlap
from gpucheck.report import Report, Skipped
from gpucheck.rig import BATCHES, Rig
from gpucheck.timing import Clock

from kvbaton.kernels.backend import Kernels, kernels_for
from kvbaton.kernels.kv_dtype import FP8

PASSED, FAILED, NO_GPU = 0, 1, 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check_results"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="one model, fewer sizes")
    parser.add_argument("--checks-only", action="store_true", help="no measurements")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --self-test")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes, to try the program out")
    parser.add_argument("--models", nargs="+", choices=list(floors.models()), help="only these")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8_e4m3"), default="auto", help="of the measured pools")
    parser.add_argument("--seed", type=int, default=None, help="of the random inputs; a new one each run")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no section begins after so many seconds")
    args = parser.parse_args(argv)
    if args.device.startswith("cpu") and not args.self_test:
        parser.error("--device cpu measures nothing; add --self-test to try the program out")
    return args


class Session:
    """The report, and the time that is left."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.clock = Clock(device, 2 if args.self_test else 10 if args.quick else 20)
        self._deadline = time.monotonic() + args.budget_s
        seed = time.time_ns() % (1 << 31) if args.seed is None else args.seed
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        self.report = Report(command, machine(device), seed)

    def section(self, what: str, run: Callable[[], None]) -> None:
        """`run` it if there is time; a failure is part of the report, and the next section still runs."""
        if time.monotonic() > self._deadline:
            self.report.skipped.append(Skipped(what, f"the budget of {self.args.budget_s:g} s was used up"))
        else:
            print(f"{what} ...", flush=True)
            try:
                run()
            except Exception:
                self.report.problems.append(Skipped(what, traceback.format_exc()))
        self.report.write(self.args.out)

    def collect(self, into: list, results: Iterable) -> None:
        """Keep results as they come; what was skipped goes where skipped things go."""
        for result in results:
            (self.report.skipped if isinstance(result, Skipped) else into).append(result)
            self.report.write(self.args.out)
            if time.monotonic() > self._deadline:
                return


def machine(device: torch.device) -> dict[str, str]:
    import triton

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "memory": f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB" if cuda else "",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _kernels(device: torch.device) -> Kernels:
    """Triton's on a GPU, and in its interpreter where TRITON_INTERPRET=1 asks for it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from kvbaton.kernels.triton_backend import TritonKernels

        return TritonKernels()
    return kernels_for(device)


def check_all(session: Session) -> None:
    generator = torch.Generator(session.device).manual_seed(session.report.seed)
    bench = Bench(session.device, _kernels(session.device), generator)
    for check in (*kernel_checks(session.args.self_test), *model_checks(session.args.self_test)):
        result = run_check(check, bench)
        session.report.checks.append(result)
        print(f"  {'ok    ' if result.passed else 'FAILED'} {result.name}: {result.error:.2e}", flush=True)


def measure_ceilings(session: Session) -> None:
    session.report.ceilings = speed.ceilings(session.clock, session.args.self_test)


def measure_model(session: Session, name: str) -> None:
    args, report, clock, found = session.args, session.report, session.clock, session.report.ceilings
    if found is None:
        raise RuntimeError("the ceilings were not measured")
    tiny, quick = args.self_test, args.quick
    config = small_config() if tiny else floors.models()[name]
    batches, contexts = (BATCHES, (1024, 4096)) if not (tiny or quick) else ((1, 32, 256), (1024,))
    lengths: tuple[int, ...] = (512, 8192) if quick else (512, 2048, 8192, 32768)
    if tiny:
        batches, contexts, lengths = (1, 8), (40,), (64,)
    kv_dtype = FP8 if args.kv_dtype == "fp8_e4m3" else None
    tokens = max(batches[-1] * (contexts[-1] + 64), lengths[-1])
    with torch.inference_mode(), closing(Rig(config, session.device, kv_dtype, tokens)) as rig:
        session.collect(report.decode, speed.decode(rig, name, batches, contexts, clock, found))
        session.collect(report.overlap, overlap(rig, name, batches, contexts[0], clock))
        session.collect(report.prefill, speed.prefill(rig, name, lengths, clock, found))
        if not (tiny or quick):
            session.collect(report.chunks, speed.chunk_sizes(rig, name, clock, found))
        session.collect(report.blocks, speed.block_copies(rig, name, clock, found))


def check_split(session: Session) -> None:
    lacking = split.missing()
    if lacking:
        session.report.skipped.append(Skipped("the split on one device", f"not installed: {', '.join(lacking)}"))
        return
    began = time.perf_counter()
    wrong, compared = split.wrong_tokens(session.device)
    seconds = time.perf_counter() - began
    session.report.checks.append(
        CheckResult("split over UCX, two engines", float(wrong), 0.0, seconds, f"{compared} tokens")
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; nothing was checked. Try --device cpu --self-test.", file=sys.stderr)
        return NO_GPU
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    session = Session(args, device)
    session.section("checks against float64", lambda: check_all(session))
    if not args.checks_only:
        session.section("ceilings", lambda: measure_ceilings(session))
        names = ["tiny"] if args.self_test else args.models or list(floors.models())[: 1 if args.quick else None]
        for name in names:
            session.section(name, lambda name=name: measure_model(session, name))
        tiny = args.self_test
        session.section("draws", lambda: session.collect(session.report.draws, speed.draws(session.clock, tiny)))
    if not args.self_test:
        session.section("split on one device", lambda: check_split(session))
    session.report.finished = True
    session.report.write(args.out)
    print(session.report.markdown())
    print(f"written to {args.out / 'gpu_check.json'} and {args.out / 'gpu_check.md'}")
    return PASSED if session.report.passed else FAILED


if __name__ == "__main__":
    sys.exit(main())
