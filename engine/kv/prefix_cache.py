"""Radix tree over block hashes: which finished blocks hold which prefix, and which of them go first when room is short.

One node is one block. Hashes chain their parent, so a hash alone finds its node and a node needs no map of children.

    root -- A -- B -- C        a node is *pinned* while its block is held or one of its children is pinned;
             `-- D -- E        the others wait in one queue, oldest first, for eviction

A node leaves the pinned state after all of its children have, and only then joins the queue at its end: children always
stand before their parents, so the head of the queue is a leaf. That is leaf-first LRU at O(1) per operation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvbaton.engine.block_hash import BlockHash


class BrokenInvariant(RuntimeError):
    """The books do not add up: a bug in who holds what."""


@dataclass(slots=True, eq=False)
class Node:
    """`pins` counts pinned children, plus one while the block itself is held."""

    block_hash: BlockHash
    block_id: int
    parent: Node | None
    held: bool
    pins: int = 0
    num_children: int = 0


class PrefixCache:
    """Nodes by hash and by block. Whoever owns the blocks tells when one is first held and last released."""

    def __init__(self) -> None:
        self._by_hash: dict[BlockHash, Node] = {}
        self._by_block: dict[int, Node] = {}
        self._queue: OrderedDict[BlockHash, Node] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_hash)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._by_block

    def is_held(self, block_id: int) -> bool:
        """Whether the cache was told that a registered block has a holder."""
        return self._by_block[block_id].held

    @property
    def num_evictable(self) -> int:
        """Blocks that can all be had by evicting again and again."""
        return len(self._queue)

    def evictable(self) -> Iterator[int]:
        """Block ids in the order in which they would be evicted."""
        return (node.block_id for node in self._queue.values())

    def hashes(self) -> Iterator[BlockHash]:
        """Every cached hash, parents before children."""
        return iter(self._by_hash)

    def match(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Blocks of the longest cached prefix; changes nothing."""
        blocks: list[int] = []
        for block_hash in hashes:
            node = self._by_hash.get(block_hash)
            if node is None:
                break
            blocks.append(node.block_id)
        return blocks

    def known_prefix(self, hashes: Sequence[BlockHash]) -> int:
        """Length of the longest cached prefix, looked for from its end: cheap when only the last blocks are new."""
        for length in range(len(hashes), 0, -1):
            if hashes[length - 1] in self._by_hash:
                return length
        return 0

    def insert(self, parent: BlockHash | None, block_hash: BlockHash, block_id: int) -> None:
        """Register a held block below `parent` (None: a prompt's first block). Neither may be registered yet."""
        if block_hash in self._by_hash or block_id in self._by_block:
            raise BrokenInvariant(f"block {block_id} or its hash {block_hash.hex()} is cached already")
        above = None if parent is None else self._by_hash[parent]
        node = Node(block_hash, block_id, above, held=True)
        if above is not None:
            above.num_children += 1
        self._by_hash[block_hash] = self._by_block[block_id] = node
        self._pin(node)

    def hold(self, block_id: int) -> None:
        """The block got its first holder."""
        node = self._by_block[block_id]
        node.held = True
        self._pin(node)

    def release(self, block_id: int) -> None:
        """The block lost its last holder; it may be evicted once no child needs it."""
        node = self._by_block[block_id]
        node.held = False
        self._unpin(node)

    def evict(self) -> Node:
        """Forget the least recently used leaf that nobody needs. Raises KeyError if there is none."""
        _, node = self._queue.popitem(last=False)
        del self._by_hash[node.block_hash]
        del self._by_block[node.block_id]
        if node.parent is not None:
            node.parent.num_children -= 1
        return node

    def check(self) -> None:
        """Raise `BrokenInvariant` unless every count and the order of the queue follow from the nodes."""
        pins = {block_hash: int(node.held) for block_hash, node in self._by_hash.items()}
        children = dict.fromkeys(self._by_hash, 0)
        for node in self._by_hash.values():
            if node.parent is not None:
                if self._by_hash.get(node.parent.block_hash) is not node.parent:
                    raise BrokenInvariant(f"block {node.block_id} is cached without its parent")
                children[node.parent.block_hash] += 1
                pins[node.parent.block_hash] += node.pins > 0
        for node in self._by_hash.values():
            self._check_node(node, pins[node.block_hash], children[node.block_hash])
        self._check_queue()

    def _check_node(self, node: Node, pins: int, children: int) -> None:
        if (node.pins, node.num_children) != (pins, children):
            raise BrokenInvariant(
                f"block {node.block_id}: {node.pins} pins, {node.num_children} children; counted {pins}, {children}"
            )
        if (node.pins == 0) != (node.block_hash in self._queue) or self._by_block.get(node.block_id) is not node:
            raise BrokenInvariant(f"block {node.block_id} with {node.pins} pins is filed wrongly")

    def _check_queue(self) -> None:
        if len(self._by_block) != len(self._by_hash) or any(key not in self._by_hash for key in self._queue):
            raise BrokenInvariant("the prefix cache remembers blocks that it has evicted")
        seen: set[BlockHash] = set()
        for node in self._queue.values():
            if node.parent is not None and node.parent.block_hash in seen:
                raise BrokenInvariant(f"block {node.block_id} would be evicted after its parent")
            seen.add(node.block_hash)

    def _pin(self, node: Node) -> None:
        above: Node | None = node
        while above is not None:
            above.pins += 1
            if above.pins > 1:
                return
            self._queue.pop(above.block_hash, None)
            above = above.parent

    def _unpin(self, node: Node) -> None:
        above: Node | None = node
        while above is not None:
            above.pins -= 1
            if above.pins:
                return
            self._queue[above.block_hash] = above
            above = above.parent
