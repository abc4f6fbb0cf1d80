"""What a decoder is: sizes and flags, as plain values. No torch, no files.

One decoder covers every family here; a family is a set of flags (biases, q/k norm, windows, experts), not a class.
`hf_config.load_model_config` makes a `ModelConfig` from a Hugging Face folder.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import asdict, dataclass, replace


class Architecture(enum.StrEnum):
    """The value of `architectures` in config.json that this engine runs."""

    LLAMA = "LlamaForCausalLM"
    QWEN2 = "Qwen2ForCausalLM"
    QWEN3 = "Qwen3ForCausalLM"
    MISTRAL = "MistralForCausalLM"
    MIXTRAL = "MixtralForCausalLM"
    QWEN3_MOE = "Qwen3MoeForCausalLM"
    PHI3 = "Phi3ForCausalLM"


class RopeType(enum.StrEnum):
    """How rotary frequencies are scaled for contexts beyond the trained one."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding: `rotary_factor` of each head turns, and cos and sin are multiplied by `attention_factor`.

    The two fields after `factor` belong to LLAMA3, the betas and `truncate` to YARN, the lists to LONGROPE.
    """

    theta: float
    kind: RopeType = RopeType.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    rotary_factor: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # one for each turning pair of dimensions
    long_factors: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        return int(head_dim * self.rotary_factor)

    def at_length(self, max_positions: int) -> RopeConfig:
        """What an engine computes whose sequences have up to `max_positions` tokens.

        LONGROPE: one list for every sequence, the short one where no sequence can be longer than the first trained
        length. transformers takes the long list from the first step at which a sequence is longer, so within that
        length an engine of long contexts differs from it. DYNAMIC changes nothing up to the model's maximum length, and
        longer sequences are not served.
        """
        if self.kind is RopeType.LONGROPE and max_positions > self.original_max_positions:
            return replace(self, short_factors=self.long_factors)
        return self


@dataclass(frozen=True, slots=True)
class MoeConfig:
    """Experts of the layers named in `layers`; the other layers keep a dense MLP.

    `normalize_top_k`: the chosen experts' probabilities are divided by their sum, so that they add up to 1.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_top_k: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer. `num_heads * head_dim` need not equal `hidden_size`.

    `sliding_windows` has one entry per layer: how many tokens a query sees, itself included, or None for all.
    `dtype` is the one that the weights were saved in.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    moe: MoeConfig | None = None
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers

    def digest(self) -> str:
        """Hex digest of every field; equal configs have equal digests on every machine and version."""
        values = asdict(self)
        if self.moe is not None:
            values["moe"]["layers"] = sorted(self.moe.layers)
        text = json.dumps(values, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
