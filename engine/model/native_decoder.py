"""The decoder on the CPU in one native call a pass: packed weights, fused layers, attention straight from the pool.

`native_decoder` turns a plain `Decoder` into this where it can; the plain one stays the path for everything else. A
row's result does not depend on its batch or on how its prompt was cut, to the last bit, whatever the dtype.
"""

from __future__ import annotations

import ctypes
import logging

import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.native_weights import NativeWeights, pack_decoder
from kvbaton.engine.model.weights import MlpWeights
from kvbaton.kernels.host_memory import Workspace
from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.native_lib import DTYPE_CODES, Team, batch_struct, native_library

log = logging.getLogger(__name__)

_MAX_LAYERS = 1000  # bounds the work counters of one pass


class NativeDecoder:
    """Same calls as `Decoder`. One thread at a time."""

    def __init__(self, decoder: Decoder, library: ctypes.CDLL) -> None:
        """Takes the weights of `decoder` over."""
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
        self.seconds: torch.Tensor | None = None  # [len(PHASES)] float64: gathers the phases' wall time if set

    @property
    def capturable(self) -> bool:
        return False

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
    """The native form of `decoder`, whose weights it takes over; `decoder` itself where there is none."""
    if decoder.device.type != "cpu" or not _fits(decoder):
        return decoder
    library = native_library()
    return decoder if library is None else NativeDecoder(decoder, library)


def _fits(decoder: Decoder) -> bool:
    """Dense layers, known dtypes, and even sizes, for bfloat16 inputs are packed in pairs."""
    config = decoder.config
    sizes = (config.hidden_size, config.q_size, config.intermediate_size, config.head_dim)
    return (
        decoder.dtype in DTYPE_CODES
        and config.num_layers <= _MAX_LAYERS
        and all(isinstance(layer.mlp, MlpWeights) for layer in decoder.weights.layers)
        and all(size % 2 == 0 for size in sizes)
    )
