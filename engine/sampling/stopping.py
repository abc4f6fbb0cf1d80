"""When a sample ends: stop ids, `max_tokens`, the model's length. Stop strings are the ingress's business."""

from __future__ import annotations

from kvbaton.engine.request import FinishReason
from kvbaton.engine.sequence import Sequence


def finish_reason(seq: Sequence, max_model_len: int) -> FinishReason | None:
    """Why `seq` ends after its newest token, or None if it goes on."""
    sampling = seq.sampling
    if seq.num_outputs >= sampling.min_tokens and seq.tokens[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if ends_by_length(seq, 0, max_model_len) else None


def ends_by_length(seq: Sequence, more_tokens: int, max_model_len: int) -> bool:
    """Whether `seq` ends with `more_tokens` tokens more, whatever they are."""
    outputs, length = seq.num_outputs + more_tokens, len(seq.tokens) + more_tokens
    return outputs >= seq.sampling.max_tokens or length >= max_model_len
