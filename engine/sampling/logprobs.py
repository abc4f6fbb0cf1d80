"""Log-probabilities as clients see them: of the model's own distribution, before bias, penalties, temperature and cuts.

That is what the OpenAI API documents and vLLM returns by default, and the only choice under which the values of a token
do not depend on how it was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from kvbaton.engine.request import TokenLogprobs


def token_logprobs(logits: torch.Tensor, token_ids: Seq[int], num_top: Seq[int]) -> list[TokenLogprobs]:
    """For row i of logits [rows, vocab]: the log-probability of token_ids[i] and of the num_top[i] best, best first."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    index = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
    chosen: list[float] = logprobs.gather(1, index).squeeze(1).tolist()
    most = min(max(num_top), logits.shape[1])
    if not most:
        return [TokenLogprobs(value) for value in chosen]
    best = logprobs.topk(most, dim=-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprobs(chosen[i], tuple(zip(tokens[i][:count], values[i][:count], strict=True)))
        for i, count in enumerate(num_top)
    ]
