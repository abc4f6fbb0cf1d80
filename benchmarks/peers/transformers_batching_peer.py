"""transformers' continuous batching (paged attention)."""

from __future__ import annotations

import torch
import transformers
from protocol import serve
from transformers import AutoModelForCausalLM, GenerationConfig


def load(args):
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation="paged|sdpa", local_files_only=True
    )
    model.eval()

    @torch.inference_mode()
    def generate(prompts, new_tokens, clock):
        config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
        )
        manager = model.init_continuous_batching(generation_config=config)
        manager.start()
        try:
            for prompt in prompts:
                manager.add_request(input_ids=prompt, max_new_tokens=new_tokens, streaming=True)
            begun, done, made = set(), set(), 0
            while len(done) < len(prompts):
                result = manager.get_result(timeout=120)
                if result is None:
                    raise TimeoutError("no result for two minutes")
                begun.add(result.request_id)
                if len(begun) == len(prompts):
                    clock.first()
                if result.is_finished():
                    done.add(result.request_id)
                    made += len(result.generated_tokens)
            return made
        finally:
            manager.stop(block=True)

    return transformers.__version__, generate


if __name__ == "__main__":
    serve(load)
