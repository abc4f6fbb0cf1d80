"""What was measured, one value a row of a table, with what follows from it. Nothing here touches a device."""

from __future__ import annotations

from dataclasses import dataclass

from gpucheck.floors import BLOCKS_GOAL


@dataclass(frozen=True, slots=True)
class Skipped:
    what: str
    why: str


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """`step_s` is what the host sees, tokens included; the parts are graphs of their own."""

    model: str
    batch: int
    context: int
    step_s: float
    floor_s: float
    goal: float
    graph_s: float
    weights_s: float
    attention_s: float
    rest_s: float
    first_s: float

    @property
    def over_floor(self) -> float:
        return self.step_s / self.floor_s

    @property
    def gaps_s(self) -> float:
        """Of the step, what no kernel accounts for: launches, the host between steps, the way of the tokens."""
        return self.step_s - self.weights_s - self.attention_s - self.rest_s

    @property
    def met(self) -> bool:
        return self.over_floor <= self.goal


@dataclass(frozen=True, slots=True)
class PrefillResult:
    model: str
    tokens: int
    chunk: int
    seconds: float
    flop: int
    floor_s: float
    goal: float

    @property
    def share(self) -> float:
        """Of the measured matmul rate."""
        return self.floor_s / self.seconds

    @property
    def met(self) -> bool:
        """The goal is set at 8k; shorter prompts are reported only."""
        return self.share >= self.goal or self.tokens < 8192


@dataclass(frozen=True, slots=True)
class OverlapResult:
    """Seconds a decode step of a running worker: `device_s` is the device's own work, the others what passes from one
    step to the next, each waited for before the next is scheduled (`alone_s`) or overlapping."""

    model: str
    batch: int
    context: int
    device_s: float
    alone_s: float
    overlapped_s: float

    @property
    def alone_gap_s(self) -> float:
        return self.alone_s - self.device_s

    @property
    def overlapped_gap_s(self) -> float:
        return self.overlapped_s - self.device_s


@dataclass(frozen=True, slots=True)
class BlockResult:
    model: str
    block_bytes: int
    moved_bytes: int
    seconds: float
    copy_bytes_s: float

    @property
    def share(self) -> float:
        return self.moved_bytes / self.seconds / self.copy_bytes_s

    @property
    def met(self) -> bool:
        return self.share >= BLOCKS_GOAL


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """Prefill attention of one layer: ours over the paged pool, torch's over gathered rows, and the gathering."""

    model: str
    queries: int
    context: int
    ours_s: float
    torch_s: float
    gather_s: float
    flop: float
    apart: float  # largest difference of the two results

    @property
    def torch_over_ours(self) -> float:
        """Below 1, gathering and torch's attention together are faster."""
        return (self.torch_s + self.gather_s) / self.ours_s


@dataclass(frozen=True, slots=True)
class LinearResult:
    """One product with 8-bit weights beside torch's with bfloat16. `floor_s` is for reading the 8-bit weights,
    `flop_floor_s` for the operations, at the measured rates."""

    model: str
    what: str
    outs: int
    ins: int
    rows: int
    int8_s: float
    bfloat16_s: float
    floor_s: float
    flop_floor_s: float

    @property
    def over_floor(self) -> float:
        return self.int8_s / max(self.floor_s, self.flop_floor_s)

    @property
    def int8_over_bfloat16(self) -> float:
        return self.int8_s / self.bfloat16_s


@dataclass(frozen=True, slots=True)
class DrawResult:
    kind: str
    rows: int
    vocab: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Weights from files in the page cache to the device."""

    model: str
    num_bytes: int
    seconds: float

    @property
    def eight_billion_s(self) -> float:
        """16 GB at the same rate."""
        return 16e9 * self.seconds / self.num_bytes
