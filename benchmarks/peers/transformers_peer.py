"""transformers' `generate` on a padless batch of equal prompts."""

from __future__ import annotations

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Mark(StoppingCriteria):
    """Called after every token; never stops."""

    def __init__(self, clock):
        self.clock = clock

    def __call__(self, input_ids, scores, **kwargs):
        self.clock.first()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(args):
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), local_files_only=True)
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(prompts, new_tokens, clock):
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Mark(clock)]),
        )
        return out[:, ids.shape[1] :].numel()

    return transformers.__version__, generate


if __name__ == "__main__":
    serve(load)
