"""OpenVINO's runtime through optimum-intel's `generate`; converts the checkpoint next to it on first use.

OpenVINO GenAI's own pipelines want a tokenizer beside the model, which random checkpoints do not have.
"""

from __future__ import annotations

from pathlib import Path

import openvino
import torch
from optimum.intel import OVModelForCausalLM
from protocol import serve
from transformers import StoppingCriteria, StoppingCriteriaList


class Mark(StoppingCriteria):
    """Called after every token; never stops."""

    def __init__(self, clock):
        self.clock = clock

    def __call__(self, input_ids, scores, **kwargs):
        self.clock.first()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def load(args):
    torch.set_num_threads(args.threads)
    folder = Path(args.model)
    out = folder.with_name(folder.name + "-openvino")
    hint = {"bfloat16": "bf16", "float32": "f32"}[args.dtype]
    config = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": args.threads, "NUM_STREAMS": 1}
    if not (out / "openvino_model.xml").exists():
        OVModelForCausalLM.from_pretrained(folder, export=True, load_in_8bit=False, compile=False).save_pretrained(out)
    model = OVModelForCausalLM.from_pretrained(out, ov_config=config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts, new_tokens, clock):
        ids = torch.tensor(prompts)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Mark(clock)]),
        )
        return made[:, ids.shape[1] :].numel()

    return openvino.__version__.partition("-")[0], generate


if __name__ == "__main__":
    serve(load)
