"""Is every kernel right on this GPU, and how far from the hardware is each step? One command, one report.

    PYTHONPATH=src python benchmarks/gpu_check.py --out results            # at most ten minutes
    PYTHONPATH=src python benchmarks/gpu_check.py --out results --quick    # one model, fewer sizes
    PYTHONPATH=src python benchmarks/gpu_check.py --device cpu --self-test # tries the program out, without a GPU

With TRITON_INTERPRET=1 before the last one the checks are of Triton's kernels, in its interpreter.

Needs torch, triton, transformers' dependencies and this repository; no network, no Ray, no Redis. Writes
gpu_check.json and gpu_check.md to the folder of --out with every value found, so that a run cut short leaves what it
had. On a GPU each part runs in a process of its own: one that breaks, dies or hangs does not take the others with it.

Exit status: 0 every check passed; 1 one failed; 2 there is no GPU. Missed goals are reported and change nothing.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
import traceback
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from gpucheck import floors
from gpucheck.checks import CheckResult
from gpucheck.isolation import ContextBroken, OutOfTime, PartFailed, isolated
from gpucheck.parts import BESIDE, CEILINGS, CHECKS, DRAWS, LOAD, SPLIT, Options, all_checks, run_part
from gpucheck.report import Report
from gpucheck.results import Skipped

from kvbaton.engine.config import QUANTIZATIONS

PASSED, FAILED, NO_GPU = 0, 1, 2
BUDGET_S = 590.0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check_results"), help="folder of the report")
    parser.add_argument("--quick", action="store_true", help="one model, fewer sizes")
    parser.add_argument("--checks-only", action="store_true", help="no measurements")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu with --self-test")
    parser.add_argument("--self-test", action="store_true", help="tiny shapes, to try the program out")
    parser.add_argument("--models", nargs="+", choices=list(floors.models()), help="only these")
    parser.add_argument("--kv-dtype", choices=("auto", "fp8_e4m3"), default="auto", help="of the measured pools")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="of the measured weights")
    parser.add_argument("--seed", type=int, default=None, help="of the random inputs; a new one each run")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds until it ends, done or not")
    args = parser.parse_args(argv)
    if args.device.startswith("cpu") and not args.self_test:
        parser.error("--device cpu measures nothing; add --self-test to try the program out")
    return args


class Session:
    """The report, the time that is left, and how a part runs: `isolated` in its own process, where a device may be
    lost.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, isolated: bool) -> None:
        self.args = args
        self._deadline = time.monotonic() + args.budget_s
        seed = time.time_ns() % (1 << 31) if args.seed is None else args.seed
        command = shlex.join([Path(sys.executable).name, *sys.argv])
        self.report = Report(command, machine(device), seed)
        self._options = Options(device, seed, args.self_test, args.quick, args.kv_dtype, args.quantization)
        self._isolated = isolated

    def part(self, name: str) -> None:
        """Run it if there is time. What it found is kept whatever becomes of it, and the next part still runs."""
        if time.monotonic() > self._deadline:
            why = f"the budget of {self.args.budget_s:g} s was used up"
            self.report.skipped.append(Skipped(name, why))
        else:
            print(f"{name} ...", flush=True)
            self._run(name)
        self.report.write(self.args.out)

    def _run(self, name: str) -> None:
        try:
            if name == CHECKS:
                self._run_checks()
            else:
                self._take(name, self._options)
        except OutOfTime:
            self.report.skipped.append(Skipped(f"the rest of: {name}", "the budget was used up"))
        except Exception as error:
            why = str(error) if isinstance(error, PartFailed) else traceback.format_exc()
            self.report.problems.append(Skipped(name, why))

    def _run_checks(self) -> None:
        """One that takes its process with it has failed; the others go on behind it."""
        names = [check.name for check in all_checks(self.args.self_test)]
        while len(self.report.checks) < len(names):
            try:
                self._take(CHECKS, replace(self._options, first_check=len(self.report.checks)))
            except OutOfTime:
                raise
            except ContextBroken:
                continue
            except PartFailed as error:
                failed = CheckResult(names[len(self.report.checks)], math.nan, 0.0, 0.0, problem=str(error))
                self._add("checks", failed)

    def _take(self, name: str, options: Options) -> None:
        options = replace(options, ceilings=self.report.ceilings)
        found = isolated(name, options, self._deadline) if self._isolated else run_part(name, options)
        with closing(found):
            for field, value in found:
                self._add(field, value)
                if not self._isolated and time.monotonic() > self._deadline:
                    raise OutOfTime

    def _add(self, field: str, value: object) -> None:
        if isinstance(value, CheckResult):
            print(f"  {'ok    ' if value.passed else 'FAILED'} {value.name}: {value.error:.2e}", flush=True)
        self.report.add(field, value)
        self.report.write(self.args.out)


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


def part_names(args: argparse.Namespace) -> list[str]:
    """In the order in which they run: what is most worth knowing first."""
    names = [CHECKS]
    if not args.checks_only:
        models = list(floors.models())[: 1 if args.quick else None]
        names += [CEILINGS, BESIDE, *(["tiny"] if args.self_test else args.models or models), DRAWS, LOAD]
    return names if args.self_test else [*names, SPLIT]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here; nothing was checked. Try --device cpu --self-test.", file=sys.stderr)
        return NO_GPU
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    session = Session(args, device, isolated=device.type == "cuda")
    for name in part_names(args):
        session.part(name)
    session.report.finished = True
    session.report.write(args.out)
    print(session.report.markdown())
    print(f"written to {args.out / 'gpu_check.json'} and {args.out / 'gpu_check.md'}")
    return PASSED if session.report.passed else FAILED


if __name__ == "__main__":
    sys.exit(main())
