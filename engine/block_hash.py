"""Prefix-chained hashes of KV blocks: equal hash = equal prefix. No torch.

The hash of block i covers the tokens of blocks 0..i and the tenant's salt, so one 16-byte value names a whole prefix.
Where generated tokens begin is part of it: their KV differs in its last bits from what the same tokens give as a prompt
(`BatchLayout` in engine/batch.py), so a block with generated tokens in it is found by a resume of that very stream, and
not by a prompt that repeats it.
BLAKE2b is keyed by nothing and collision-resistant, so a crafted prompt cannot read another prompt's blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BlockHash = bytes
HASH_BYTES = 16


def root_hash(salt: str) -> BlockHash:
    """The parent of a prompt's first block: differs between tenants with different salts."""
    return hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"kvbaton-root").digest()


def extend_hash(parent: BlockHash, block_tokens: Sequence[int], num_prompt: int) -> BlockHash:
    """Hash of one full block that follows `parent`. The first `num_prompt` of its tokens are prompt: a number below 0
    counts as 0, one above the block's size as all."""
    covered = array("q", block_tokens)
    if num_prompt < len(block_tokens):
        covered.append(max(num_prompt, 0))
    return hashlib.blake2b(parent + covered.tobytes(), digest_size=HASH_BYTES).digest()


def block_hashes(
    tokens: Sequence[int], block_size: int, salt: str = "", num_prompt: int | None = None
) -> list[BlockHash]:
    """Hashes of the len(tokens) // block_size full blocks of `tokens`; a partial last block has none.

    The tokens from `num_prompt` on were generated; None: all are prompt."""
    hashes: list[BlockHash] = []
    parent, prompt = root_hash(salt), len(tokens) if num_prompt is None else num_prompt
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = extend_hash(parent, tokens[start : start + block_size], prompt - start)
        hashes.append(parent)
    return hashes
