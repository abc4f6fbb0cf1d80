"""vLLM on the CPU, its engine stepped in this process."""

from __future__ import annotations

import itertools
import os

from protocol import arguments, serve

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["OMP_NUM_THREADS"] = str(arguments().threads)
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def load(args):
    import torch
    import vllm

    llm = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=4096,
    )
    torch.set_num_threads(args.threads)
    engine = llm.llm_engine
    numbers = itertools.count()

    def generate(prompts, new_tokens, clock):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            engine.add_request(f"r{next(numbers)}", {"prompt_token_ids": prompt}, params)
        begun, made = set(), 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.outputs[0].token_ids:
                    begun.add(output.request_id)
                if output.finished:
                    made += len(output.outputs[0].token_ids)
            if len(begun) == len(prompts):
                clock.first()
        return made

    return vllm.__version__, generate


if __name__ == "__main__":
    serve(load)
