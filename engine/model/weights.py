"""The decoder's weights, with the projections that read the same input fused into one matrix.

    qkv      [(num_heads + 2 * num_kv_heads) * head_dim, hidden]    q rows, then k, then v
    gate_up  [2 * intermediate, hidden]                              gate rows, then up
    experts  the same two with a leading [num_experts]

`empty_weights` allocates; `slots` names every part of every buffer as Hugging Face checkpoints do. Loading, saving and
random initialisation are all one walk over the slots, and `tie` at its end.

A matrix is a plain tensor, or 8-bit integers with a scale for each row. Both are filled by `copy_` and cut into rows by
`row_parts`, so loading need not know which it fills. A quantized model holds the matrices above and `lm_head` as
integers, and everything else, the embedding too, as it is.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvbaton.engine.model.hf_config import check_quantization
from kvbaton.engine.model.model_config import Architecture, ModelConfig, MoeConfig
from kvbaton.kernels.quantization import quantize_into


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """Row o stands for weight[o] * scale[o]; see `kernels.quantization`."""

    weight: torch.Tensor  # [out, in] int8
    scale: torch.Tensor  # [out] float32

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device) -> Int8Matrix:
        """Uninitialised."""
        weight = torch.empty(rows, columns, dtype=torch.int8, device=device)
        return cls(weight, torch.empty(rows, dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def copy_(self, source: torch.Tensor) -> None:
        """Quantize source [out, in] into this; raises ValueError for values that are not finite."""
        quantize_into(source, self.weight, self.scale)


Matrix = torch.Tensor | Int8Matrix


def plain(matrix: Matrix) -> torch.Tensor:
    """A matrix that is a plain tensor; raises ValueError for one of integers."""
    if isinstance(matrix, Int8Matrix):
        raise ValueError("the matrix is quantized: this needs the model's own weights")
    return matrix


def row_parts(matrix: Matrix, sizes: Sequence[int]) -> list[Matrix]:
    """Views of `sizes` rows each, in order."""
    if isinstance(matrix, Int8Matrix):
        parts = zip(torch.split(matrix.weight, list(sizes)), torch.split(matrix.scale, list(sizes)), strict=True)
        return [Int8Matrix(weight, scale) for weight, scale in parts]
    return list(torch.split(matrix, list(sizes)))


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Biases and norms that the family does not have are None."""

    qkv: Matrix  # [q_size + 2 * kv_size, hidden]
    qkv_bias: torch.Tensor | None  # [q_size + 2 * kv_size]
    out: Matrix  # [hidden, q_size]
    out_bias: torch.Tensor | None  # [hidden]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]


@dataclass(frozen=True, slots=True)
class MlpWeights:
    gate_up: Matrix  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None  # [2 * intermediate]
    down: Matrix  # [hidden, intermediate]
    down_bias: torch.Tensor | None  # [hidden]


@dataclass(frozen=True, slots=True)
class MoeWeights:
    router: torch.Tensor  # [num_experts, hidden]
    gate_up: torch.Tensor  # [num_experts, 2 * intermediate, hidden]
    down: torch.Tensor  # [num_experts, hidden, intermediate]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: torch.Tensor  # [hidden]
    attention: AttentionWeights
    post_norm: torch.Tensor  # [hidden]
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """`lm_head` is the same tensor as `embed` where the model ties them and is not quantized."""

    embed: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: Matrix  # [vocab, hidden]


class Part(enum.Enum):
    """What a slot is for; random initialisation scales by it."""

    EMBED = enum.auto()
    LM_HEAD = enum.auto()
    NORM = enum.auto()
    QK_NORM = enum.auto()
    QKV = enum.auto()
    Q = enum.auto()
    K = enum.auto()
    V = enum.auto()
    OUT = enum.auto()
    GATE = enum.auto()
    UP = enum.auto()
    DOWN = enum.auto()
    ROUTER = enum.auto()
    BIAS = enum.auto()


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """`target` is a view: `copy_` fills that part of a fused buffer. A checkpoint's tensor has its shape."""

    name: str
    target: Matrix
    part: Part


@dataclass(frozen=True, slots=True)
class Allocator:
    """Uninitialised tensors of one dtype on one device; matrices of integers where `int8`."""

    dtype: torch.dtype
    device: torch.device
    int8: bool = False

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def matrix(self, rows: int, columns: int) -> Matrix:
        """[rows, columns]"""
        return Int8Matrix.empty(rows, columns, self.device) if self.int8 else self(rows, columns)


def empty_weights(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, quantization: str = "none"
) -> DecoderWeights:
    """Every buffer of the model, uninitialised. Raises `ConfigError` for a model that cannot be quantized."""
    check_quantization(config, quantization)
    int8 = quantization == "int8"
    new = Allocator(dtype, device, int8)
    embed = new(config.vocab_size, config.hidden_size)
    return DecoderWeights(
        embed=embed,
        layers=tuple(_empty_layer(config, layer, new) for layer in range(config.num_layers)),
        norm=new(config.hidden_size),
        lm_head=embed if config.tie_word_embeddings and not int8 else new.matrix(*embed.shape),
    )


def _empty_layer(config: ModelConfig, layer: int, new: Allocator) -> LayerWeights:
    hidden, qkv = config.hidden_size, config.q_size + 2 * config.kv_size
    attention = AttentionWeights(
        qkv=new.matrix(qkv, hidden),
        qkv_bias=new(qkv) if config.qkv_bias else None,
        out=new.matrix(hidden, config.q_size),
        out_bias=new(hidden) if config.o_bias else None,
        q_norm=new(config.head_dim) if config.qk_norm else None,
        k_norm=new(config.head_dim) if config.qk_norm else None,
    )
    mlp = _empty_moe(hidden, config.moe, new) if config.moe and config.is_moe_layer(layer) else _empty_mlp(config, new)
    return LayerWeights(new(hidden), attention, new(hidden), mlp)


def _empty_mlp(config: ModelConfig, new: Allocator) -> MlpWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    return MlpWeights(
        gate_up=new.matrix(2 * inner, hidden),
        gate_up_bias=new(2 * inner) if config.mlp_bias else None,
        down=new.matrix(hidden, inner),
        down_bias=new(hidden) if config.mlp_bias else None,
    )


def _empty_moe(hidden: int, moe: MoeConfig, new: Allocator) -> MoeWeights:
    inner, experts = moe.intermediate_size, moe.num_experts
    return MoeWeights(new(experts, hidden), new(experts, 2 * inner, hidden), new(experts, hidden, inner))


class ExpertNaming(enum.Enum):
    """The names under which a checkpoint stores experts."""

    PER_EXPERT = "per expert"  # as on the hub, and as transformers saves
    STACKED = "stacked"  # one tensor a layer, as transformers holds them in memory


def slots(
    config: ModelConfig, weights: DecoderWeights, naming: ExpertNaming = ExpertNaming.PER_EXPERT
) -> Iterator[WeightSlot]:
    """Every tensor of a checkpoint exactly once; a tied `lm_head` is not among them."""
    yield WeightSlot("model.embed_tokens.weight", weights.embed, Part.EMBED)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}"
        yield WeightSlot(f"{prefix}.input_layernorm.weight", layer.input_norm, Part.NORM)
        yield from _attention_slots(f"{prefix}.self_attn", config, layer.attention)
        yield WeightSlot(f"{prefix}.post_attention_layernorm.weight", layer.post_norm, Part.NORM)
        if isinstance(layer.mlp, MlpWeights):
            yield from _mlp_slots(f"{prefix}.mlp", config, layer.mlp)
        elif naming is ExpertNaming.STACKED:
            yield from _stacked_expert_slots(f"{prefix}.mlp", layer.mlp)
        else:
            yield from _expert_slots(prefix, config, layer.mlp)
    yield WeightSlot("model.norm.weight", weights.norm, Part.NORM)
    if not config.tie_word_embeddings:
        yield WeightSlot("lm_head.weight", weights.lm_head, Part.LM_HEAD)


def tie(config: ModelConfig, weights: DecoderWeights) -> None:
    """Once all slots are filled: the integers of a tied output projection, from the embedding."""
    if config.tie_word_embeddings and isinstance(weights.lm_head, Int8Matrix):
        weights.lm_head.copy_(weights.embed)


def _attention_slots(prefix: str, config: ModelConfig, attention: AttentionWeights) -> Iterator[WeightSlot]:
    if config.architecture is Architecture.PHI3:
        yield WeightSlot(f"{prefix}.qkv_proj.weight", attention.qkv, Part.QKV)
        yield WeightSlot(f"{prefix}.o_proj.weight", attention.out, Part.OUT)
        return
    sizes = [config.q_size, config.kv_size, config.kv_size]
    projections = (("q_proj", Part.Q), ("k_proj", Part.K), ("v_proj", Part.V))
    for (name, part), rows in zip(projections, row_parts(attention.qkv, sizes), strict=True):
        yield WeightSlot(f"{prefix}.{name}.weight", rows, part)
    if attention.qkv_bias is not None:
        for (name, _), rows in zip(projections, torch.split(attention.qkv_bias, sizes), strict=True):
            yield WeightSlot(f"{prefix}.{name}.bias", rows, Part.BIAS)
    yield WeightSlot(f"{prefix}.o_proj.weight", attention.out, Part.OUT)
    if attention.out_bias is not None:
        yield WeightSlot(f"{prefix}.o_proj.bias", attention.out_bias, Part.BIAS)
    if attention.q_norm is not None and attention.k_norm is not None:
        yield WeightSlot(f"{prefix}.q_norm.weight", attention.q_norm, Part.QK_NORM)
        yield WeightSlot(f"{prefix}.k_norm.weight", attention.k_norm, Part.QK_NORM)


def _mlp_slots(prefix: str, config: ModelConfig, mlp: MlpWeights) -> Iterator[WeightSlot]:
    if config.architecture is Architecture.PHI3:
        yield WeightSlot(f"{prefix}.gate_up_proj.weight", mlp.gate_up, Part.GATE)
        yield WeightSlot(f"{prefix}.down_proj.weight", mlp.down, Part.DOWN)
        return
    gate, up = row_parts(mlp.gate_up, [mlp.gate_up.shape[0] // 2] * 2)
    yield WeightSlot(f"{prefix}.gate_proj.weight", gate, Part.GATE)
    yield WeightSlot(f"{prefix}.up_proj.weight", up, Part.UP)
    yield WeightSlot(f"{prefix}.down_proj.weight", mlp.down, Part.DOWN)
    if mlp.gate_up_bias is not None and mlp.down_bias is not None:
        gate_bias, up_bias = mlp.gate_up_bias.chunk(2)
        yield WeightSlot(f"{prefix}.gate_proj.bias", gate_bias, Part.BIAS)
        yield WeightSlot(f"{prefix}.up_proj.bias", up_bias, Part.BIAS)
        yield WeightSlot(f"{prefix}.down_proj.bias", mlp.down_bias, Part.BIAS)


def _expert_slots(layer: str, config: ModelConfig, moe: MoeWeights) -> Iterator[WeightSlot]:
    mixtral = config.architecture is Architecture.MIXTRAL
    prefix = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
    gate_name, up_name, down_name = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield WeightSlot(f"{prefix}.gate.weight", moe.router, Part.ROUTER)
    for expert, (gate_up, down) in enumerate(zip(moe.gate_up, moe.down, strict=True)):
        gate, up = gate_up.chunk(2)
        yield WeightSlot(f"{prefix}.experts.{expert}.{gate_name}.weight", gate, Part.GATE)
        yield WeightSlot(f"{prefix}.experts.{expert}.{up_name}.weight", up, Part.UP)
        yield WeightSlot(f"{prefix}.experts.{expert}.{down_name}.weight", down, Part.DOWN)


def _stacked_expert_slots(prefix: str, moe: MoeWeights) -> Iterator[WeightSlot]:
    yield WeightSlot(f"{prefix}.gate.weight", moe.router, Part.ROUTER)
    yield WeightSlot(f"{prefix}.experts.gate_up_proj", moe.gate_up, Part.GATE)
    yield WeightSlot(f"{prefix}.experts.down_proj", moe.down, Part.DOWN)
