"""Makes a tiny random checkpoint that behaves: a real Hugging Face folder, in a second or two, without a download.

    python -m kvbaton.engine.tiny OUT --family llama --layers 4 --hidden 64

Seeds are tried until greedy output from the probe prompts is varied and never nearly tied, so that it can be compared
token by token with another implementation. Families differ in style on purpose: some config.json files are written as
transformers 4 did, some as 5 does.
"""

from __future__ import annotations

import argparse
import enum
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kvbaton.engine.greedy import generate
from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import resolve_dtype, save_weights
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.model.random_weights import random_weights
from kvbaton.engine.model.weights import DecoderWeights, plain
from kvbaton.engine.text.tiny_tokenizer import NUM_PLAIN, SpecialIds, plain_text_ids, save_tokenizer
from kvbaton.kernels.backend import kernels_for
from kvbaton.settings import ConfigError

PROBE_LENGTHS = (4, 17, 32, 50, 75, 128, 201)
PROBE_TOKENS = 64
MIN_MEDIAN_DISTINCT = 41
MIN_DISTINCT = 30
MIN_GAP = 0.002
_MAX_TRIES = 40
_UNLIKELY = 0.3  # scale of the logits of tokens that are not printable


class Family(enum.StrEnum):
    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    MISTRAL = "mistral"
    MIXTRAL = "mixtral"
    QWEN3_MOE = "qwen3_moe"
    PHI3 = "phi3"


@dataclass(frozen=True, slots=True)
class TinySpec:
    """Sizes of a tiny model. `seed` None starts at one that is known to behave at the default sizes.

    `check` False takes the first seed as it is: for benchmarks at sizes where a trial run takes long.
    """

    family: Family = Family.LLAMA
    layers: int = 4
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    vocab: int = 512
    max_positions: int = 8192
    dtype: str = "float32"
    seed: int | None = None
    check: bool = True


class NoGoodSeed(RuntimeError):
    """No random model of these sizes gave output that is fit for exact comparison."""


_KNOWN_SEEDS = {
    Family.LLAMA: 0,
    Family.QWEN2: 31,
    Family.QWEN3: 0,
    Family.MISTRAL: 1,
    Family.MIXTRAL: 0,
    Family.QWEN3_MOE: 0,
    Family.PHI3: 38,
}


def make_tiny(folder: Path, spec: TinySpec | None = None) -> int:
    """Write config.json, model.safetensors, the tokenizer's files and generation_config.json; return the seed."""
    spec = spec or TinySpec()
    folder.mkdir(parents=True, exist_ok=True)
    special = save_tokenizer(folder, spec.max_positions)
    (folder / "config.json").write_text(json.dumps(_config_json(spec, special), indent=2) + "\n")
    generation = {"bos_token_id": special.bos, "eos_token_id": [special.eos, special.im_end]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    config = load_model_config(folder)
    first_seed = _KNOWN_SEEDS[spec.family] if spec.seed is None else spec.seed
    seed, weights = _choose_weights(config, first_seed, _MAX_TRIES if spec.check else 0)
    save_weights(folder, config, weights, resolve_dtype(config, "auto"))
    return seed


def probe_prompts() -> list[list[int]]:
    """Seven prompts of fixed plain tokens, of `PROBE_LENGTHS`."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(NUM_PLAIN, (length,), generator=generator).tolist() for length in PROBE_LENGTHS]


def _choose_weights(config: ModelConfig, first_seed: int, tries: int) -> tuple[int, DecoderWeights]:
    """Judged in float32, whatever they are saved in: 16 bits make ties. No tries: the first seed is taken unseen."""
    printable, cpu = plain_text_ids(), torch.device("cpu")
    for seed in range(first_seed, first_seed + max(tries, 1)):
        weights = random_weights(config, seed, torch.float32, cpu)
        _prefer(printable, weights)
        if not tries or _behaves(Decoder(config, weights, kernels_for(cpu), max_positions=512)):
            return seed, weights
    raise NoGoodSeed(f"none of the seeds {first_seed}..{first_seed + tries - 1} gave varied and clear output")


def _prefer(token_ids: list[int], weights: DecoderWeights) -> None:
    """Make other tokens rare, so that a demonstration prints text and does not end early."""
    logit_rows = plain(weights.lm_head)
    rare = torch.ones(logit_rows.shape[0], dtype=torch.bool)
    rare[token_ids] = False
    logit_rows[rare] *= _UNLIKELY


def _behaves(decoder: Decoder) -> bool:
    results = generate(decoder, probe_prompts(), PROBE_TOKENS)
    distinct = [len(set(result.tokens)) for result in results]
    return (
        min(result.smallest_gap for result in results) > MIN_GAP
        and median(distinct) >= MIN_MEDIAN_DISTINCT
        and min(distinct) >= MIN_DISTINCT
        and not any(eos in result.tokens for eos in decoder.config.eos_token_ids for result in results)
    )


def _config_json(spec: TinySpec, special: SpecialIds) -> dict[str, Any]:
    """The parsed form of config.json."""
    common = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": 2 * spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "bos_token_id": special.bos,
        "eos_token_id": special.im_end,
    }
    return common | _family_json(spec)


def _family_json(spec: TinySpec) -> dict[str, Any]:
    old_style = {"torch_dtype": spec.dtype, "rope_theta": 10000.0}
    new_style = {"dtype": spec.dtype, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    window = 64
    match spec.family:
        case Family.LLAMA:
            scaling = {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": max(64, spec.max_positions // 8),
            }
            return _named("Llama", "llama") | old_style | {"rope_scaling": scaling}
        case Family.QWEN2:
            return _named("Qwen2", "qwen2") | old_style | {"tie_word_embeddings": True}
        case Family.QWEN3:
            return _named("Qwen3", "qwen3") | new_style
        case Family.MISTRAL:
            return _named("Mistral", "mistral") | new_style | {"sliding_window": window}
        case Family.MIXTRAL:
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
            return _named("Mixtral", "mixtral") | old_style | experts
        case Family.QWEN3_MOE:
            experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": spec.hidden}
            dense = {"mlp_only_layers": [0], "decoder_sparse_step": 1, "norm_topk_prob": True}
            return _named("Qwen3Moe", "qwen3_moe") | new_style | experts | dense
        case Family.PHI3:
            turning = spec.head_dim // 4  # pairs: half of each head turns
            factors = {"short_factor": [1.0 + i / 8 for i in range(turning)], "long_factor": [4.0] * turning}
            scaling = {"type": "longrope", "original_max_position_embeddings": spec.max_positions} | factors
            partial = {"partial_rotary_factor": 0.5, "original_max_position_embeddings": spec.max_positions}
            return _named("Phi3", "phi3") | old_style | partial | {"rope_scaling": scaling, "pad_token_id": 0}


def _named(prefix: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [f"{prefix}ForCausalLM"], "model_type": model_type}


def main(arguments: list[str] | None = None, program: str = "python -m kvbaton.engine.tiny") -> int:
    """The command; prints one line. `program` is what it is called by."""
    parser = argparse.ArgumentParser(prog=program, description="Make a tiny random checkpoint.")
    defaults = TinySpec()
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--family", type=Family, choices=list(Family), default=defaults.family)
    for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "max_positions"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--unchecked", dest="check", action="store_false", help="take the first seed without a trial")
    values = vars(parser.parse_args(arguments))
    out = values.pop("out")
    try:
        seed = make_tiny(out, TinySpec(**values))
    except (ConfigError, NoGoodSeed) as error:
        parser.exit(1, f"error: {error}\n")
    except OSError as error:
        parser.exit(1, f"error: cannot write {out}: {error.strerror}\n")
    sys.stdout.write(f"{values['family']} model with seed {seed} written to {out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
