"""A sequence: one sample of one request on one engine, with the tokens it has and the blocks it holds.

    tokens        [ prompt ............ | emitted before a resume .. | sampled here ... ]
    KV in pool    [ num_computed tokens ......... | in_flight ) <- the next step computes from here
    block_table   block i holds tokens i*block_size .. (i+1)*block_size-1

The scheduler that runs a sequence owns it; only that scheduler changes it. Status changes go through `to`.
"""

from __future__ import annotations

import enum

from kvbaton.engine.block_hash import BlockHash, extend_hash, root_hash
from kvbaton.engine.request import FinishReason, Request, SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"  # holds no blocks
    PREFILLING = "prefilling"
    RUNNING = "running"
    MIGRATING = "migrating"  # not scheduled while its last blocks travel to another engine; keeps its own
    PREEMPTED = "preempted"  # was RUNNING, gave its blocks back, waits to be recomputed
    FINISHED = "finished"


_LEGAL: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.PREFILLING, Status.RUNNING, Status.FINISHED}),
    Status.PREFILLING: frozenset({Status.RUNNING, Status.WAITING, Status.PREEMPTED, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.PREEMPTED, Status.MIGRATING, Status.FINISHED}),
    Status.MIGRATING: frozenset({Status.RUNNING, Status.FINISHED}),
    Status.PREEMPTED: frozenset({Status.PREFILLING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A state change that the life of a sequence or a hand-off does not have."""


class Sequence:
    """Tokens, block table and progress of one sample.

    While a request with n > 1 is prefilled it is one sequence whose `samples` are all indices; after the first
    tokens are drawn it is forked into one sequence a sample.
    """

    __slots__ = (
        "__weakref__",
        "_hashes",
        "arrival_s",
        "block_table",
        "cached_tokens",
        "in_flight",
        "num_computed",
        "request",
        "samples",
        "status",
        "tokens",
    )

    def __init__(self, request: Request, arrival_s: float, samples: tuple[int, ...] | None = None) -> None:
        self.request = request
        self.samples = request.sample_indices if samples is None else samples
        self.tokens: list[int] = list(request.context)
        self.block_table: list[int] = []
        self.num_computed = 0
        self.in_flight = 0  # tokens of a step that has been launched and has not landed; their KV is not final
        self.cached_tokens = 0  # of num_computed, how many came from the prefix cache
        self.arrival_s = arrival_s
        self.status = Status.WAITING
        self._hashes: list[BlockHash] = []

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_outputs(self) -> int:
        """Output tokens so far, the ones emitted before a resume included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_scheduled(self) -> int:
        """Where the next step goes on."""
        return self.num_computed + self.in_flight

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is not in the pool yet; 1 for a sequence that decodes."""
        return len(self.tokens) - self.num_computed

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Why the sample ends with its newest token, or None. Stop strings are the ingress's business."""
        sampling = self.sampling
        if self.num_outputs >= sampling.min_tokens and self.tokens[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.ends_by_length(0, max_model_len) else None

    def ends_by_length(self, more_tokens: int, max_model_len: int) -> bool:
        """Whether it ends with `more_tokens` tokens more, whatever they are."""
        outputs, length = self.num_outputs + more_tokens, len(self.tokens) + more_tokens
        return outputs >= self.sampling.max_tokens or length >= max_model_len

    def to(self, status: Status) -> None:
        """The one place where the status changes; raises `IllegalTransition`."""
        if status not in _LEGAL[self.status]:
            raise IllegalTransition(f"sequence {self.request.request_id}: {self.status.value} -> {status.value}")
        self.status = status

    def branch(self, sample: int) -> Sequence:
        """One sample of a computed prompt, on the same blocks; the caller forks the holds on them."""
        one = Sequence(self.request, self.arrival_s, (sample,))
        one.block_table = list(self.block_table)
        one.num_computed = self.num_computed
        one.cached_tokens = self.cached_tokens
        return one

    def hashes(self, block_size: int, num_blocks: int) -> list[BlockHash]:
        """Hashes of the first `num_blocks` blocks, which must be full; computed once and kept."""
        parent = self._hashes[-1] if self._hashes else root_hash(self.request.cache_salt)
        while len(self._hashes) < num_blocks:
            start = len(self._hashes) * block_size
            block = self.tokens[start : start + block_size]
            if len(block) < block_size:
                raise ValueError(f"block {len(self._hashes)} is not full: {len(self.tokens)} tokens of {block_size}")
            parent = extend_hash(parent, block, self.num_prompt - start)
            self._hashes.append(parent)
        return self._hashes[:num_blocks]
