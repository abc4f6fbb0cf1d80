"""CTranslate2's Generator; converts the checkpoint next to it on first use."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
from protocol import serve


def converted(model: str, dtype: str) -> str:
    """CTranslate2's own format. Its reader of checkpoints wants a tokenizer, so the vocabulary is made up."""
    out = Path(model).with_name(Path(model).name + "-ct2")
    if not (out / "model.bin").exists():
        import json

        from ctranslate2.converters import TransformersConverter
        from ctranslate2.converters import transformers as readers

        vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]

        class Plain:
            bos_token, eos_token, unk_token = "t1", "t2", "t0"

            def get_vocab(self):
                return {f"t{i}": i for i in range(vocab)}

            def convert_ids_to_tokens(self, ids):
                return f"t{ids}" if isinstance(ids, int) else [f"t{i}" for i in ids]

        for loader in readers._MODEL_LOADERS.values():
            type(loader).get_vocabulary = lambda self, model, tokenizer: [f"t{i}" for i in range(vocab)]
        TransformersConverter.load_tokenizer = lambda self, *args, **kwargs: Plain()
        TransformersConverter(model).convert(str(out), quantization=dtype)
    return str(out)


def load(args):
    generator = ctranslate2.Generator(
        converted(args.model, args.dtype), device="cpu", compute_type=args.dtype, intra_threads=args.threads
    )

    def generate(prompts, new_tokens, clock):
        started = set()

        def each(result):
            started.add(result.batch_id)
            if len(started) == len(prompts):
                clock.first()
            return False

        results = generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=each,
        )
        return sum(len(result.sequences_ids[0]) for result in results)

    return f"{ctranslate2.__version__} ({generator.compute_type})", generate


if __name__ == "__main__":
    serve(load)
