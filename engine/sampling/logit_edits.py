"""Changes to logits before a token is chosen: logit_bias, min_tokens, repetition, frequency and presence penalties.

In vLLM's order: bias, then the stop tokens that `min_tokens` forbids, then penalties. Repetition (Keskar et al., CTRL)
looks at prompt and output; frequency and presence (OpenAI) at the output alone. All edits touch a few tokens of a row,
so they are flat lists of (row, token, value), one indexed write per kind for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kvbaton.engine.request import SamplingParams
from kvbaton.engine.sequence import Sequence

# Finite, so that a row whose every token is forbidden still has a distribution; far below what any model computes.
FORBIDDEN = -1e30

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Edits:
    """`values[i]` is for token `tokens[i]` of row `rows[i]`; a (row, token) pair occurs once."""

    rows: Ids
    tokens: Ids
    values: Values

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.rows).to(device), torch.from_numpy(self.tokens).to(device)

    def to(self, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(self.values).to(device)


def needs_edits(seq: Sequence) -> bool:
    """Whether any edit applies to the next token of `seq`."""
    sampling = seq.sampling
    return (
        bool(sampling.logit_bias)
        or _forbids_stop(seq)
        or sampling.repetition_penalty != 1.0
        or _penalises_output(sampling)
    )


def edit_logits(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    """Apply the edits of `seqs[i]` to row i of logits [rows, vocab], in place."""
    _bias(logits, seqs)
    _forbid_stops(logits, seqs)
    _penalise_repetition(logits, seqs)
    _penalise_output(logits, seqs)


def _bias(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    edits = _gather(
        [(row, *_merged_bias(seq.sampling.logit_bias)) for row, seq in enumerate(seqs) if seq.sampling.logit_bias]
    )
    if edits is not None:
        logits.index_put_(edits.index(logits.device), edits.to(logits.device), accumulate=True)


def _forbid_stops(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    found = []
    for row, seq in enumerate(seqs):
        if _forbids_stop(seq):
            tokens = np.unique(np.array(seq.sampling.stop_token_ids, dtype=np.int64))
            found.append((row, tokens, np.full(len(tokens), FORBIDDEN, dtype=np.float32)))
    edits = _gather(found)
    if edits is not None:
        logits.index_put_(edits.index(logits.device), edits.to(logits.device))


def _penalise_repetition(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    found = []
    for row, seq in enumerate(seqs):
        penalty = seq.sampling.repetition_penalty
        if penalty != 1.0:
            tokens = np.unique(np.array(seq.tokens, dtype=np.int64))
            found.append((row, tokens, np.full(len(tokens), penalty, dtype=np.float32)))
    edits = _gather(found)
    if edits is not None:
        index, penalty_of = edits.index(logits.device), edits.to(logits.device)
        old = logits[index]  # [edits]
        logits.index_put_(index, torch.where(old > 0, old / penalty_of, old * penalty_of))


def _penalise_output(logits: torch.Tensor, seqs: Seq[Sequence]) -> None:
    found = []
    for row, seq in enumerate(seqs):
        sampling = seq.sampling
        if _penalises_output(sampling) and seq.num_outputs:
            output = np.array(seq.tokens[seq.num_prompt :], dtype=np.int64)
            tokens, counts = np.unique(output, return_counts=True)
            values = -(sampling.frequency_penalty * counts + sampling.presence_penalty)
            found.append((row, tokens, values.astype(np.float32)))
    edits = _gather(found)
    if edits is not None:
        logits.index_put_(edits.index(logits.device), edits.to(logits.device), accumulate=True)


def _forbids_stop(seq: Sequence) -> bool:
    return seq.num_outputs < seq.sampling.min_tokens and bool(seq.sampling.stop_token_ids)


def _penalises_output(sampling: SamplingParams) -> bool:
    return sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


def _merged_bias(bias: tuple[tuple[int, float], ...]) -> tuple[Ids, Values]:
    merged = dict(bias)  # as in a JSON object, the last one counts
    return np.array(list(merged), dtype=np.int64), np.array(list(merged.values()), dtype=np.float32)


def _gather(found: list[tuple[int, Ids, Values]]) -> _Edits | None:
    if not found:
        return None
    rows = np.repeat(np.array([row for row, _, _ in found]), [len(tokens) for _, tokens, _ in found])
    return _Edits(rows, np.concatenate([t for _, t, _ in found]), np.concatenate([v for _, _, v in found]))
