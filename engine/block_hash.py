"""Prefix-chained hashes of KV blocks: equal hash = equal prefix. No torch.

The hash of block i covers the tokens of blocks 0..i and the tenant's salt, so one 16-byte value names a whole prefix.
BLAKE2b is keyed by nothing and collision-resistant, so a crafted prompt cannot read another prompt's blocks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

BlockHash = bytes
HASH_BYTES = 16


def root_hash(salt: str) -> BlockHash:
    """The parent of a prompt's first block: differs between tenants with different salts."""
    return hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"kvbaton-root").digest()


def extend_hash(parent: BlockHash, block_tokens: Sequence[int]) -> BlockHash:
    """Hash of one full block that follows `parent`."""
    return hashlib.blake2b(parent + array("q", block_tokens).tobytes(), digest_size=HASH_BYTES).digest()


def iter_block_hashes(tokens: Sequence[int], block_size: int, salt: str = "") -> Iterator[BlockHash]:
    """Hashes of the full blocks of `tokens`, in order; a partial last block has none."""
    parent = root_hash(salt)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = extend_hash(parent, tokens[start : start + block_size])
        yield parent


def block_hashes(tokens: Sequence[int], block_size: int, salt: str = "") -> list[BlockHash]:
    """All of `iter_block_hashes` as a list of len(tokens) // block_size values."""
    return list(iter_block_hashes(tokens, block_size, salt))
