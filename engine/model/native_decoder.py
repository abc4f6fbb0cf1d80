"""The decoder on the CPU in one native call per pass: packed weights, fused layers, attention straight from the pool.

`native_decoder` turns a plain `Decoder` into this where it can; the plain one stays the path for everything else. A
row's result does not depend on its batch or on how its prompt was cut, to the last bit, whatever the dtype.

Packing consumes a weight: as soon as its packed copy exists, the plain tensor's memory is given back, so a model is
never in memory twice. A consumed tensor raises when it is read.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass

import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.weights import AttentionWeights, DecoderWeights, Int8Matrix, LayerWeights, Matrix, MlpWeights
from kvbaton.kernels.host_memory import Workspace, zeroed_memory
from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.native_lib import (
    DTYPE_CODES,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    Team,
    batch_struct,
    native_library,
)

log = logging.getLogger(__name__)

_MAX_LAYERS = 1000  # bounds the work counters of one pass
PANEL = 32  # columns that are packed together; biases are padded to whole panels
_HALF_PANEL = PANEL // 2


class NativeDecoder:
    """Same calls as `Decoder`. One thread at a time."""

    def __init__(self, decoder: Decoder, library: ctypes.CDLL) -> None:
        """Consumes the weights of `decoder`."""
        self.config = decoder.config
        self.device: torch.device = decoder.device
        self.dtype: torch.dtype = decoder.dtype
        self.max_positions = decoder.max_positions
        self._library = library
        self._team = Team(library)
        self._workspace = Workspace()
        self._logits = Workspace()
        self._weights: NativeWeights = pack_decoder(decoder, library)
        self._model = ctypes.addressof(self._weights.model)
        self.seconds: torch.Tensor | None = None  # [len(PHASES)] float64: if set, each phase adds its wall time

    def forward(self, token_ids: torch.Tensor, kv_cache: torch.Tensor, meta: AttentionMeta) -> torch.Tensor:
        """token_ids [num_tokens] int64 -> normed hidden states [num_tokens, hidden]; as `Decoder.forward`."""
        if not kv_cache.is_contiguous() or kv_cache.dtype is not self.dtype:
            raise ValueError(f"the KV pool is {kv_cache.dtype}, the model {self.dtype}")
        if meta.max_context_len > self.max_positions:
            raise ValueError(f"a context of {meta.max_context_len} tokens; rotary tables end at {self.max_positions}")
        ids = token_ids.contiguous()
        batch = batch_struct(meta, kv_cache, self.seconds)
        hidden = torch.empty(ids.shape[0], self.config.hidden_size, dtype=self.dtype)
        team, address = self._team.handle(), ctypes.addressof(batch)
        needed = self._library.kvb_workspace_bytes(self._model, address, self._team.size)
        work = self._workspace.pointer(needed)
        self._library.kvb_forward(team, self._model, address, ids.data_ptr(), hidden.data_ptr(), work)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, hidden] of `forward` -> float32 [rows, vocab], which the next call overwrites: megabytes of new
        memory a step would cost more than the product."""
        rows = hidden.contiguous()
        shape = (rows.shape[0], self.config.vocab_size)
        out = self._logits.bytes(shape[0] * shape[1] * 4).view(torch.float32).view(shape)
        work = self._workspace.pointer(rows.numel() * 4)
        self._library.kvb_logits(self._team.handle(), self._model, rows.data_ptr(), rows.shape[0], out.data_ptr(), work)
        return out


def native_decoder(decoder: Decoder) -> NativeDecoder | Decoder:
    """The native form of `decoder`, whose weights it consumes; `decoder` itself where there is none."""
    if decoder.device.type != "cpu" or not _fits(decoder):
        return decoder
    library = native_library()
    return decoder if library is None else NativeDecoder(decoder, library)


def _fits(decoder: Decoder) -> bool:
    """Dense layers, known dtypes, and even sizes, since bfloat16 inputs are packed in pairs."""
    config = decoder.config
    sizes = (config.hidden_size, config.q_size, config.intermediate_size, config.head_dim)
    return (
        decoder.dtype in DTYPE_CODES
        and config.num_layers <= _MAX_LAYERS
        and all(isinstance(layer.mlp, MlpWeights) for layer in decoder.weights.layers)
        and all(size % 2 == 0 for size in sizes)
    )


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
    """Consumes the decoder's matrices; it cannot run afterwards."""
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
