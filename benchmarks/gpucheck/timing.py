"""Seconds of device work: CUDA events on a GPU, the wall clock elsewhere; medians, with the first runs left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvbaton.engine.cuda_graphs import CudaCapture, run_again

WARM_UP = 3


@dataclass(frozen=True, slots=True)
class Clock:
    """`reps` timed runs after a warm-up."""

    device: torch.device
    reps: int

    def device_s(self, run: Callable[[], object]) -> float:
        """Median time of `run` on the device, launches queued ahead so that the host is not part of it."""
        if self.device.type != "cuda":
            return self.wall_s(run)
        for _ in range(WARM_UP):
            run()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.reps)
        ]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    def wall_s(self, run: Callable[[], object]) -> float:
        """Median time of `run` as the host sees it, the device's end awaited each time."""
        samples = []
        for i in range(WARM_UP + self.reps):
            self.settle()
            began = time.perf_counter()
            run()
            self.settle()
            if i >= WARM_UP:
                samples.append(time.perf_counter() - began)
        return statistics.median(samples)

    def captured_s(self, run: Callable[[], None]) -> float:
        """As `device_s`, of `run` as one CUDA graph: kernels and the gaps that a graph leaves, no launches."""
        capture = CudaCapture() if self.device.type == "cuda" else run_again
        return self.device_s(capture(run))

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
