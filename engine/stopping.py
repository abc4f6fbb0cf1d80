"""When a sample ends: stop ids, `max_tokens`, the model's length. Stop strings are the ingress's business."""

from __future__ import annotations

from kvbaton.engine.request import FinishReason
from kvbaton.engine.sequence import Sequence


def finish_reason(seq: Sequence, max_model_len: int) -> FinishReason | None:
    """Why `seq` ends after its newest token, or None if it goes on."""
    sampling = seq.sampling
    if seq.num_outputs >= sampling.min_tokens and seq.tokens[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    if seq.num_outputs >= sampling.max_tokens or len(seq.tokens) >= max_model_len:
        return FinishReason.LENGTH
    return None
