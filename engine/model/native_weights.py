"""A decoder's weights in the layout that the native library multiplies with, and the structures that point at them.

Packing takes a weight over: as soon as its packed copy exists, the plain tensor's memory is given back, so a model
never lies in memory twice. A taken tensor raises when it is read.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.matrix import Int8Matrix, Matrix
from kvbaton.engine.model.weights import AttentionWeights, DecoderWeights, LayerWeights, MlpWeights
from kvbaton.kernels.host_memory import zeroed_memory
from kvbaton.kernels.native_lib import DTYPE_CODES, LayerStruct, MatrixStruct, ModelStruct

PANEL = 32  # columns that are packed together; biases are padded to whole panels
_HALF_PANEL = PANEL // 2


@dataclass(frozen=True, slots=True)
class NativeWeights:
    """`model` points into `kept`; it is valid as long as this object lives."""

    model: ModelStruct
    kept: tuple[object, ...]


class Packer:
    """Packs tensors of one model and keeps what the structures point at."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, num_bytes: int) -> None:
        """`num_bytes`: of all packed weights together, an upper bound; unused room stays untouched."""
        self._library = library
        self._code = DTYPE_CODES[dtype]
        self._arena = zeroed_memory(num_bytes)
        self._used = 0
        self.kept: list[object] = [self._arena]

    def keep(self, tensor: torch.Tensor | None) -> int | None:
        """The address of a tensor that is used as it is."""
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def matrix(self, matrix: Matrix, bias: torch.Tensor | None = None, interleave: bool = False) -> MatrixStruct:
        """matrix [out, in] in panels, with bias [out]. `interleave`: the rows are gate, then up."""
        if isinstance(matrix, Int8Matrix):
            scale = self.columns(matrix.scale, interleave)
            return MatrixStruct(self._pack(matrix.weight, interleave), scale, self.columns(bias, interleave))
        return MatrixStruct(self._pack(matrix, interleave), None, self.columns(bias, interleave))

    def _pack(self, weight: torch.Tensor, interleave: bool) -> int:
        """weight [out, in] -> address of its panels."""
        int8 = weight.dtype is torch.int8
        size = self._library.kvb_packed_int8_bytes if int8 else self._library.kvb_packed_bytes
        pack = self._library.kvb_pack_int8 if int8 else self._library.kvb_pack
        out, inputs = weight.shape
        rows = 2 * _whole(out // 2, _HALF_PANEL) if interleave else out
        address: int = self._arena.data_ptr() + self._used
        self._used += size(self._code, rows, inputs)
        if self._used > self._arena.numel():
            raise ValueError(f"packed weights need more than {self._arena.numel()} bytes")
        source = weight.contiguous()
        pack(self._code, source.data_ptr(), address, out, inputs, int(interleave))
        weight.untyped_storage().resize_(0)
        return address

    def columns(self, values: torch.Tensor | None, interleave: bool) -> int | None:
        """values [out], a bias or scales, as float32 in the order of the packed columns."""
        if values is None:
            return None
        parts = values.float().chunk(2) if interleave else (values.float(),)
        width = _HALF_PANEL if interleave else PANEL
        padded = [torch.nn.functional.pad(part, (0, _whole(len(part), width) - len(part))) for part in parts]
        return self.keep(torch.stack([part.view(-1, width) for part in padded], dim=1).flatten())


def pack_decoder(decoder: Decoder, library: ctypes.CDLL) -> NativeWeights:
    """Takes the decoder's matrices over; it cannot run afterwards."""
    config, weights = decoder.config, decoder.weights
    packer = Packer(library, decoder.dtype, _packed_bound(weights))
    layers = (LayerStruct * config.num_layers)()
    for index, layer in enumerate(weights.layers):
        layers[index] = _layer(packer, layer, config.sliding_windows[index])
    in_logits = weights.lm_head is weights.embed
    lm_head = packer.matrix(weights.lm_head)
    model = ModelStruct(
        dtype=DTYPE_CODES[decoder.dtype],
        num_layers=config.num_layers,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rotary_half=decoder.rotary.cos.shape[1],
        norm_eps=config.rms_norm_eps,
        scale=config.head_dim**-0.5,
        embed=None if in_logits else packer.keep(weights.embed),
        lm_head=lm_head.panels,
        lm_head_scale=lm_head.scale,
        norm=packer.keep(weights.norm),
        cos=packer.keep(decoder.rotary.cos),
        sin=packer.keep(decoder.rotary.sin),
        layers=layers,
    )
    return NativeWeights(model, (*packer.kept, layers))


def _layer(packer: Packer, layer: LayerWeights, window: int | None) -> LayerStruct:
    if not isinstance(layer.mlp, MlpWeights):
        raise ValueError("expert layers are not packed")
    struct = LayerStruct(window=window or 0)
    struct.input_norm = packer.keep(layer.input_norm)
    struct.post_norm = packer.keep(layer.post_norm)
    _point_at_attention(struct, packer, layer.attention)
    _point_at_mlp(struct, packer, layer.mlp)
    return struct


def _point_at_attention(struct: LayerStruct, packer: Packer, attention: AttentionWeights) -> None:
    struct.qkv = packer.matrix(attention.qkv, attention.qkv_bias)
    struct.q_norm = packer.keep(attention.q_norm)
    struct.k_norm = packer.keep(attention.k_norm)
    struct.out = packer.matrix(attention.out, attention.out_bias)


def _point_at_mlp(struct: LayerStruct, packer: Packer, mlp: MlpWeights) -> None:
    struct.gate_up = packer.matrix(mlp.gate_up, mlp.gate_up_bias, interleave=True)
    struct.down = packer.matrix(mlp.down, mlp.down_bias)


def _packed_bound(weights: DecoderWeights) -> int:
    """Bytes of all matrices with every side rounded up to whole panels."""
    matrices = [weights.lm_head]
    for layer in weights.layers:
        matrices += [layer.attention.qkv, layer.attention.out]
        if isinstance(layer.mlp, MlpWeights):
            matrices += [layer.mlp.gate_up, layer.mlp.down]
    held = [matrix.weight if isinstance(matrix, Int8Matrix) else matrix for matrix in matrices]
    return sum(_whole(m.shape[0] + PANEL, PANEL) * (m.shape[1] + 1) * m.element_size() for m in held)


def _whole(count: int, unit: int) -> int:
    return -(-count // unit) * unit
