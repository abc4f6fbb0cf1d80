"""The tensors of a GGUF file under the names and in the layout that Hugging Face checkpoints have.

Two things differ besides the names. Experts are stacked, [num_experts, rows, columns], and are given one by one here;
and in files of the `llama` family the d rows of each head of q and k are interleaved, (0, d/2, 1, d/2 + 1, ...),
because llama.cpp rotates neighbours where transformers rotates halves; they are put back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from kvbaton.engine.gguf_file import GgufFile, GgufTensor
from kvbaton.engine.model.checkpoint import SAMPLE_BYTES, StoredTensor
from kvbaton.engine.model.gguf_config import ROPE_FACTORS
from kvbaton.engine.model.model_config import Architecture, ModelConfig

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)(?:\.(?P<expert>\d+))?\.(?P<suffix>weight|bias)")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as transformers names it, and where it is. `heads` whose rows are interleaved, 0 for none."""

    name: str
    source: GgufTensor
    heads: int


class GgufCheckpoint:
    """Names, shapes and values of what a GGUF file holds; the counterpart of `Checkpoint`."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        """Raises `ConfigError` for a tensor of a kind that the library cannot dequantize."""
        self.origin = file.path
        self.kinds = frozenset(kind.name for kind in GGMLQuantizationType if _can_dequantize(kind))
        self._file = file
        entries = (
            entry for tensor in file.tensors if tensor.name != ROPE_FACTORS for entry in _entries(tensor, file, config)
        )
        self._entries = {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(
            StoredTensor(e.name, self.origin, e.source.kind.name, e.source.shape, e.source.offset, e.source.num_bytes)
            for e in self._entries.values()
        )

    @property
    def num_bytes(self) -> int:
        return sum(entry.source.num_bytes for entry in self._entries.values())

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def digest(self) -> str:
        """Hex digest of every tensor's name, kind, shape and a sample of its bytes."""
        state = hashlib.blake2b(digest_size=16)
        with self.origin.open("rb") as handle:
            for entry in self._entries.values():
                source = entry.source
                handle.seek(source.offset + max(0, source.num_bytes - SAMPLE_BYTES) // 2)
                state.update(f"{entry.name} {source.kind.name} {source.shape}".encode())
                state.update(handle.read(min(SAMPLE_BYTES, source.num_bytes)))
        return state.hexdigest()

    def values(self, names: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each of `names` with its values in float32, one at a time."""
        for entry in self._entries.values():
            if entry.name in names:
                values = self._file.values(entry.source)
                yield entry.name, torch.from_numpy(np.array(_halves(values, entry.heads) if entry.heads else values))


def _can_dequantize(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _entries(tensor: GgufTensor, file: GgufFile, config: ModelConfig) -> Iterator[_Entry]:
    found = _NAME.fullmatch(tensor.name)
    if found is None:
        yield _Entry(tensor.name, tensor, 0)  # to be refused as unexpected, by its own name
        return
    part, suffix = found["part"], found["suffix"]
    if found["layer"] is None:
        yield _Entry(f"{_WHOLE.get(part, part)}.{suffix}", tensor, 0)
        return
    prefix, mixtral = f"model.layers.{found['layer']}", config.architecture is Architecture.MIXTRAL
    mlp = f"{prefix}.{'block_sparse_moe' if mixtral else 'mlp'}"
    kind = part.removeprefix("ffn_").removesuffix("_exps")
    projection = _MIXTRAL.get(kind, kind) if mixtral else f"{kind}_proj"
    if part == "ffn_gate_inp":
        yield _Entry(f"{mlp}.gate.{suffix}", tensor, 0)
    elif found["expert"] is not None:
        yield _Entry(f"{mlp}.experts.{found['expert']}.{projection}.{suffix}", tensor, 0)
    elif part.endswith("_exps"):
        for expert in range(tensor.shape[0]):
            yield _Entry(f"{mlp}.experts.{expert}.{projection}.{suffix}", _expert(tensor, expert), 0)
    else:
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(part, 0)
        interleaved = heads if file.architecture == "llama" else 0
        yield _Entry(f"{prefix}.{_LAYER.get(part, part)}.{suffix}", tensor, interleaved)


def _expert(stacked: GgufTensor, expert: int) -> GgufTensor:
    """One expert's slice of [num_experts, rows, columns]."""
    block, block_bytes = GGML_QUANT_SIZES[stacked.kind]
    size = prod(stacked.shape[1:]) // block * block_bytes
    return replace(stacked, shape=stacked.shape[1:], offset=stacked.offset + expert * size)


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (0, d/2, 1, d/2 + 1, ...) to (0, 1, ...); values: [heads * d, ...]."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
