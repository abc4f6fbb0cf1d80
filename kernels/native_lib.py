"""The native library as ctypes sees it: structures and signatures of `native/kvb.h`, and threads with an owner.

Calls release the GIL. Every pointer is that of a contiguous CPU tensor that the caller keeps alive.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from kvbaton.kernels.meta import AttentionMeta
from kvbaton.kernels.native_build import NativeUnavailable, built_library

log = logging.getLogger(__name__)

PHASES = ("embedding", "norms", "qkv", "rope and KV write", "attention", "out", "gate and up", "down")
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class MatrixStruct(Structure):
    """`kvb_matrix`."""

    _fields_ = tuple((name, c_void_p) for name in ("panels", "scale", "bias"))


class LayerStruct(Structure):
    """`kvb_layer`."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("qkv", MatrixStruct),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("out", MatrixStruct),
        ("post_norm", c_void_p),
        ("gate_up", MatrixStruct),
        ("down", MatrixStruct),
        ("window", c_int64),
    )


class ModelStruct(Structure):
    """`kvb_model`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "num_layers", "vocab", "hidden", "intermediate", "num_heads")),
        *((name, c_int64) for name in ("num_kv_heads", "head_dim", "rotary_half")),
        ("norm_eps", c_double),
        ("scale", c_double),
        *((name, c_void_p) for name in ("embed", "lm_head", "lm_head_scale", "norm", "cos", "sin")),
        ("layers", POINTER(LayerStruct)),
    )


class BatchStruct(Structure):
    """`kvb_batch`."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_seqs", "num_decodes", "table_width", "max_context")),
        *((name, c_int64) for name in ("block_size", "pool_layers")),
        *((name, c_void_p) for name in ("positions", "slots", "block_tables", "cu_seqlens", "context_lens", "pool")),
        ("seconds", c_void_p),
    )


class HeadsStruct(Structure):
    """`kvb_heads`."""

    _fields_ = (
        *((name, c_int64) for name in ("dtype", "num_heads", "num_kv_heads", "head_dim", "rotary_half", "layer")),
        ("window", c_int64),
        ("scale", c_double),
    )


_I, _P = c_int64, c_void_p
_SIGNATURES: tuple[tuple[str, object, Sequence[object]], ...] = (
    ("kvb_describe", c_char_p, ()),
    ("kvb_packed_bytes", _I, (_I, _I, _I)),
    ("kvb_pack", None, (_I, _P, _P, _I, _I, _I)),
    ("kvb_packed_int8_bytes", _I, (_I, _I, _I)),
    ("kvb_pack_int8", None, (_I, _P, _P, _I, _I, _I)),
    ("kvb_workspace_bytes", _I, (_P, _P, _I)),
    ("kvb_forward", None, (_P, _P, _P, _P, _P, _P)),
    ("kvb_logits", None, (_P, _P, _P, _I, _P, _P)),
    ("kvb_argmax", None, (_P, _I, _I, _P)),
    ("kvb_linear", None, (_P, _I, _P, _P, _P, _P, _I, _I, _I, _P)),
    ("kvb_linear_int8", None, (_P, _I, _P, _P, _P, _P, _P, _I, _I, _I, _P)),
    ("kvb_attention_bytes", _I, (_P, _P, _I)),
    ("kvb_attention", None, (_P, _P, _P, _P, _P, _P)),
    ("team_make", _P, (c_int,)),
    ("team_free", None, (_P,)),
)


@cache
def native_library() -> ctypes.CDLL | None:
    """The library, or None with one notice in the log where there is none."""
    try:
        library = load_library(built_library())
    except (NativeUnavailable, OSError) as error:
        log.warning("CPU kernels fall back to plain PyTorch, which is slower: %s", error)
        return None
    log.info("CPU kernels: %s", library.kvb_describe().decode())
    return library


def load_library(path: Path) -> ctypes.CDLL:
    """The library at `path` with its signatures declared. Raises OSError."""
    library = ctypes.CDLL(str(path))
    for name, result, arguments in _SIGNATURES:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def batch_struct(meta: AttentionMeta, kv_cache: torch.Tensor, seconds: torch.Tensor | None = None) -> BatchStruct:
    """Points into `meta` and kv_cache [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].

    seconds [len(PHASES)] float64 gathers wall time by phase."""
    return BatchStruct(
        meta.num_tokens,
        meta.num_seqs,
        meta.num_decodes,
        meta.block_tables.shape[1],
        meta.max_context_len,
        meta.block_size,
        kv_cache.shape[1],
        meta.positions.data_ptr(),
        meta.slot_mapping.data_ptr(),
        meta.block_tables.data_ptr(),
        meta.cu_seqlens_q.data_ptr(),
        meta.context_lens.data_ptr(),
        kv_cache.data_ptr(),
        None if seconds is None else seconds.data_ptr(),
    )


class Team:
    """Threads of one engine; as many as torch's setting says at the time of a call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._size = 0
        self._handle: int | None = None

    @property
    def size(self) -> int:
        return self._size

    def handle(self) -> int:
        """The team for the next call."""
        wanted = torch.get_num_threads()
        if wanted != self._size or self._handle is None:
            self.close()
            self._handle = self._library.team_make(wanted)
            if not self._handle:
                raise RuntimeError(f"could not start {wanted} threads for CPU kernels")
            self._size = wanted
        return self._handle

    def close(self) -> None:
        """End the threads; the next `handle` starts new ones."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.team_free(handle)

    def __del__(self) -> None:
        self.close()
