"""What the hardware asks for: bytes and operations of a step, and the time that they take at the measured rates.

Decode must read every weight that a token meets and every K and V of its context: their bytes over the rate at which
this device copies (bytes read + bytes written). Prefill must do its matrix products: their operations over the rate
of a large bfloat16 product on this device.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.engine.model.model_config import Architecture, ModelConfig, RopeConfig

DECODE_GOAL = 1.15  # time over floor at batch 32 and more
DECODE_GOAL_SMALL = 1.3
PREFILL_GOAL = 0.6  # of the measured matmul rate at 8k
BLOCKS_GOAL = 0.8  # of the measured copy bandwidth


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on this device."""

    copy_bytes_s: float
    matmul_flop_s: float


def _model(architecture: Architecture, vocab: int, hidden: int, inner: int, layers: int, heads: int) -> ModelConfig:
    qwen = architecture is Architecture.QWEN3
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6 if qwen else 1e-5,
        max_position_embeddings=40960,
        rope=RopeConfig(1e6 if qwen else 5e5),
        sliding_windows=(None,) * layers,
        qk_norm=qwen,
        tie_word_embeddings=hidden == 1024,
        dtype="bfloat16",
    )


def models() -> dict[str, ModelConfig]:
    """The shapes of published models; the weights are random."""
    return {
        "Qwen3-0.6B": _model(Architecture.QWEN3, 151936, 1024, 3072, 28, 16),
        "Llama-3-8B": _model(Architecture.LLAMA, 128256, 4096, 14336, 32, 32),
        "Qwen3-8B": _model(Architecture.QWEN3, 151936, 4096, 12288, 36, 32),
    }


def matmul_params(config: ModelConfig) -> int:
    """Weights of the matrix products of one token, the last one (logits) left out."""
    attention = config.hidden_size * (2 * config.q_size + 2 * config.kv_size)
    return config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def weight_bytes(config: ModelConfig, itemsize: int) -> int:
    """Read by every decode step, whatever its batch; embeddings count once, as the product that gives logits."""
    return (matmul_params(config) + config.vocab_size * config.hidden_size) * itemsize


def kv_bytes(config: ModelConfig, batch: int, context: int, itemsize: int) -> int:
    return batch * context * 2 * config.num_layers * config.kv_size * itemsize


def decode_floor_s(
    config: ModelConfig, batch: int, context: int, kv_itemsize: int, ceilings: Ceilings, weight_itemsize: int = 2
) -> float:
    read = weight_bytes(config, weight_itemsize) + kv_bytes(config, batch, context, kv_itemsize)
    return read / ceilings.copy_bytes_s


def decode_goal(batch: int) -> float:
    return DECODE_GOAL if batch >= 32 else DECODE_GOAL_SMALL


def prefill_flop(config: ModelConfig, tokens: int) -> int:
    """Two operations a weight and token, and causal attention: half of tokens x tokens, twice."""
    attention = 2 * config.q_size * tokens * tokens * config.num_layers
    logits = 2 * config.vocab_size * config.hidden_size
    return 2 * matmul_params(config) * tokens + attention + logits
