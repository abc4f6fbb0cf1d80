"""One step on the device: scheduled rows in, sampled tokens out, in the same order.

    rows -> pieces, see `BatchLayout` -> ragged batch -> hidden states -> logits of the rows that draw -> tokens

The runner remembers one thing about a sequence: between two chunks of a prompt whose `prompt_logprobs` are asked for,
the hidden state of its last computed token, from which the next chunk's first log-probability comes.
"""

from __future__ import annotations

from itertools import chain
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from kvbaton.engine.batch import BatchLayout, SampledToken, ScheduledRow, StepResult
from kvbaton.engine.cuda_graphs import DecodeGraphs, DecodePass
from kvbaton.engine.pending import LaunchedStep, PromptLogprobs, TokenFeed, mark_of
from kvbaton.engine.sampling.device_sampler import DeviceSampler, PendingTokens
from kvbaton.engine.sampling.sampler import Draw, sample_tokens, token_logprobs
from kvbaton.engine.sequence import Sequence
from kvbaton.kernels.backend import draw_kernels_for
from kvbaton.kernels.meta import AttentionMeta, build_attention_meta

LOGPROB_ROWS = 128  # prompt tokens whose logits [LOGPROB_ROWS, vocab] exist at a time


class ForwardPass(DecodePass, Protocol):
    """What runs a model: the plain decoder or the native one. See `Decoder` for the shapes."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The next call may overwrite what this one returned."""
        ...


class Runner:
    """A decoder with its KV pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""

    def __init__(
        self,
        decoder: ForwardPass,
        pool: torch.Tensor,
        graphs: DecodeGraphs | None = None,
        sampler: DeviceSampler | None = None,
    ) -> None:
        """Steps of single tokens run by `graphs` where there are any, plain draws by `sampler`."""
        self._decoder = decoder
        self._graphs = graphs
        self._sampler = sampler
        self._pool = pool
        self._block_size = pool.shape[4]
        self._feed = TokenFeed(draw_kernels_for(decoder.device))
        self._tails: WeakKeyDictionary[Sequence, torch.Tensor] = WeakKeyDictionary()  # [hidden] each

    def run(self, rows: list[ScheduledRow]) -> StepResult:
        """Launch and wait."""
        return self.launch(rows).wait()

    @torch.inference_mode()
    def launch(self, rows: list[ScheduledRow]) -> LaunchedStep:
        """Have `rows` computed and their KV written; at least one row, each of at least one token.

        Another step may be launched before this one is waited for. On CUDA this returns while the device computes; on
        the CPU everything is done by then, and only the tokens are held back."""
        layout = BatchLayout.of(rows)
        hidden = self._forward(rows, layout)
        prompt_logprobs = self._prompt_logprobs(rows, layout, hidden)
        drawn = self._sample(rows, layout, hidden)
        return LaunchedStep(rows, drawn, prompt_logprobs, mark_of(self._decoder.device))

    def _forward(self, rows: list[ScheduledRow], layout: BatchLayout) -> torch.Tensor:
        """[num_tokens, hidden], valid until the next step."""
        bucket = self._graphs.bucket(rows, layout) if self._graphs is not None else None
        if self._graphs is not None and bucket is not None:
            return self._graphs.forward(rows, bucket, self._feed)
        return self._decoder.forward(self._token_ids(rows, layout), self._pool, self._meta(rows, layout))

    def _meta(self, rows: list[ScheduledRow], layout: BatchLayout) -> AttentionMeta:
        return build_attention_meta(
            layout.lens,
            [start + count for start, count in zip(layout.starts, layout.lens, strict=True)],
            [rows[i].seq.block_table for i in layout.owners],
            self._block_size,
            self._decoder.device,
            layout.num_decodes,
        )

    def _token_ids(self, rows: list[ScheduledRow], layout: BatchLayout) -> torch.Tensor:  # [num_tokens] int64
        tokens, first = [self._feed.tokens(row) for row in rows], [row.start for row in rows]
        pieces = zip(layout.owners, layout.starts, layout.lens, strict=True)
        flat = chain.from_iterable(tokens[i][start - first[i] : start - first[i] + count] for i, start, count in pieces)
        ids = torch.from_numpy(np.fromiter(flat, dtype=np.int64))
        if self._decoder.device.type == "cuda":
            ids = ids.pin_memory().to(self._decoder.device, non_blocking=True)
        self._feed.fill(rows, ids)
        return ids

    def _sample(
        self, rows: list[ScheduledRow], layout: BatchLayout, hidden: torch.Tensor
    ) -> PendingTokens | list[SampledToken]:
        """hidden [num_tokens, hidden]; only the last token of each row that draws becomes logits."""
        drawing = [i for i, row in enumerate(rows) if row.samples]
        if not drawing:
            self._feed.drew([], [])
            return []
        logits = self._decoder.logits(_rows_at(hidden, [layout.last[i] for i in drawing]))  # [len(drawing), vocab]
        draws = [_draw(rows[i], sample, place) for place, i in enumerate(drawing) for sample in rows[i].samples]
        if self._sampler is not None and self._sampler.takes(draws):
            pending = self._sampler.start(logits, draws)
            self._feed.drew(draws, pending.tokens)
            return pending
        sampled = sample_tokens(logits, draws)
        self._feed.drew(draws, [token.token_id for token in sampled])
        return sampled

    def _prompt_logprobs(
        self, rows: list[ScheduledRow], layout: BatchLayout, hidden: torch.Tensor
    ) -> list[PromptLogprobs | None]:
        results: list[PromptLogprobs | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row.seq.sampling.prompt_logprobs is not None and not row.seq.num_outputs:  # all prompt: one piece
                end = layout.last[i] + 1
                results[i] = self._row_logprobs(row, hidden[end - row.num_tokens : end])
        return results

    def _row_logprobs(self, row: ScheduledRow, hidden: torch.Tensor) -> PromptLogprobs:
        """hidden [row.num_tokens, hidden] predicts the row's tokens from the second on; the first needs the tail."""
        tail = self._tails.pop(row.seq, None)
        if not row.samples:
            self._tails[row.seq] = hidden[-1].clone()
        tokens = _row_tokens(row)
        first: PromptLogprobs = ()
        if tail is None:
            first, tokens, before = (None,), tokens[1:], hidden[:-1]
        else:
            before = torch.cat((tail.unsqueeze(0), hidden[:-1]))
        top = row.seq.sampling.prompt_logprobs or 0
        parts = (
            token_logprobs(self._decoder.logits(before[at : at + LOGPROB_ROWS]), part, [top] * len(part))
            for at in range(0, len(tokens), LOGPROB_ROWS)
            if (part := tokens[at : at + LOGPROB_ROWS])
        )
        return (*first, *chain.from_iterable(parts))


def _row_tokens(row: ScheduledRow) -> list[int]:
    return row.seq.tokens[row.start : row.start + row.num_tokens]


def _draw(row: ScheduledRow, sample: int, place: int) -> Draw:
    """The token behind the row, whose logits are at `place`."""
    return Draw(row.seq, sample, place, row.start + row.num_tokens - len(row.seq.tokens))


def _rows_at(hidden: torch.Tensor, places: list[int]) -> torch.Tensor:
    """[len(places), hidden]"""
    if places == list(range(hidden.shape[0])):
        return hidden  # one token a row, and all of them draw
    index = torch.tensor(places)
    if hidden.is_cuda:
        index = index.pin_memory().to(hidden.device, non_blocking=True)
    return hidden[index]
