"""The parts of the program, each a generator of (field of the report, value for it), which comes as it is found.

A part takes nothing from another but the ceilings, so that each can run in a process of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from gpucheck import beside, floors, loading, speed, split
from gpucheck.checks import Bench, Check, CheckResult, kernel_checks, run_check
from gpucheck.floors import Ceilings
from gpucheck.model_checks import model_checks, small_config
from gpucheck.overlap import overlap
from gpucheck.results import Skipped
from gpucheck.rig import BATCHES, Rig
from gpucheck.timing import Clock

from kvbaton.kernels.backend import Kernels, kernels_for
from kvbaton.kernels.quantization import FP8

Found = tuple[str, object]

CHECKS = "checks against float64"
CEILINGS = "ceilings"
BESIDE = "beside torch"
DRAWS = "draws"
LOAD = "loading weights"
SPLIT = "split on one device"
BESIDE_MODEL = "Llama-3-8B"
LOAD_MODEL = "Qwen3-0.6B"  # of a size that is written to a file in a moment


@dataclass(frozen=True, slots=True)
class Options:
    """What every part is told. `tiny`: shapes that a CPU does in a moment. `first_check`: those before it are done."""

    device: torch.device
    seed: int
    tiny: bool = False
    quick: bool = False
    kv_dtype: str = "auto"
    quantization: str = "none"
    ceilings: Ceilings | None = None
    first_check: int = 0

    @property
    def clock(self) -> Clock:
        return Clock(self.device, 2 if self.tiny else 10 if self.quick else 20)


def all_checks(tiny: bool) -> list[Check]:
    return [*kernel_checks(tiny), *model_checks(tiny)]


def run_part(name: str, options: Options) -> Iterator[Found]:
    """`name` is one of those above, or a model's."""
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    if name == CHECKS:
        yield from _checks(options)
    elif name == CEILINGS:
        yield "ceilings", speed.ceilings(options.clock, options.tiny)
    elif name == BESIDE:
        yield from _beside(options)
    elif name == DRAWS:
        yield from _sorted("draws", speed.draws(options.clock, options.tiny))
    elif name == LOAD:
        yield from _load(options)
    elif name == SPLIT:
        yield from _split(options)
    else:
        yield from _model(name, options)


def _checks(options: Options) -> Iterator[Found]:
    for i, check in enumerate(all_checks(options.tiny)[options.first_check :], options.first_check):
        generator = torch.Generator(options.device).manual_seed(options.seed + i)  # its inputs whatever ran before
        yield "checks", run_check(check, Bench(options.device, _kernels(options.device), generator))


def _kernels(device: torch.device) -> Kernels:
    """Triton's on a GPU, and in its interpreter where TRITON_INTERPRET=1 asks for it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from kvbaton.kernels.triton_backend import TritonKernels

        return TritonKernels()
    return kernels_for(device)


def _model(name: str, options: Options) -> Iterator[Found]:
    tiny, quick, clock, found = options.tiny, options.quick, options.clock, _ceilings(options)
    config = small_config() if tiny else floors.models()[name]
    batches, contexts = (BATCHES, (1024, 4096)) if not (tiny or quick) else ((1, 32, 256), (1024,))
    lengths: tuple[int, ...] = (512, 8192) if quick else (512, 2048, 8192, 32768)
    if tiny:
        batches, contexts, lengths = (1, 8), (40,), (64,)
    kv_dtype = FP8 if options.kv_dtype == "fp8_e4m3" else None
    tokens = max(batches[-1] * (contexts[-1] + 64), lengths[-1])
    with torch.inference_mode(), closing(Rig(config, options.device, kv_dtype, tokens, options.quantization)) as rig:
        yield from _sorted("decode", speed.decode(rig, name, batches, contexts, clock, found))
        yield from _sorted("overlap", overlap(rig, name, batches, contexts[0], clock))
        yield from _sorted("prefill", speed.prefill(rig, name, lengths, clock, found))
        if not (tiny or quick):
            yield from _sorted("chunks", speed.chunk_sizes(rig, name, clock, found))
        yield from _sorted("blocks", speed.block_copies(rig, name, clock, found))


def _beside(options: Options) -> Iterator[Found]:
    """Triton's kernels, so there is nothing to measure on a CPU but in the interpreter."""
    tiny, quick, clock, found = options.tiny, options.quick, options.clock, _ceilings(options)
    config, name = (small_config(), "tiny") if tiny else (floors.models()[BESIDE_MODEL], BESIDE_MODEL)
    if options.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        yield "skipped", Skipped(BESIDE, "Triton needs a GPU, or TRITON_INTERPRET=1")
        return
    lengths: tuple[int, ...] = (70,) if tiny else (512, 8192) if quick else (512, 2048, 8192, 32768)
    rows, caches_bytes = ((1, 70), 0) if tiny else (beside.ROWS, beside.CACHES_BYTES)
    with torch.inference_mode():
        yield from _sorted("attention", beside.prefill_attention(config, name, lengths, clock))
        yield from _sorted("linear", beside.products(config, name, rows, clock, found, caches_bytes))


def _load(options: Options) -> Iterator[Found]:
    name = "tiny" if options.tiny else LOAD_MODEL
    config = small_config() if options.tiny else floors.models()[name]
    for result in loading.load(config, name, options.clock):
        yield ("checks" if isinstance(result, CheckResult) else "load"), result


def _split(options: Options) -> Iterator[Found]:
    lacking = split.missing()
    if lacking:
        yield "skipped", Skipped(SPLIT, f"not installed: {', '.join(lacking)}")
        return
    began = time.perf_counter()
    wrong, compared = split.wrong_tokens(options.device)
    seconds = time.perf_counter() - began
    yield "checks", CheckResult("split over UCX, two engines", float(wrong), 0.0, seconds, f"{compared} tokens")


def _ceilings(options: Options) -> Ceilings:
    if options.ceilings is None:
        raise RuntimeError("the ceilings were not measured")
    return options.ceilings


def _sorted(field: str, results: Iterable[object]) -> Iterator[Found]:
    """What was skipped goes where skipped things go."""
    for result in results:
        yield ("skipped" if isinstance(result, Skipped) else field), result
