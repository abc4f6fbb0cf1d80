"""Optional checksums of blocks: the sender's over what it posts, the receiver's over what has landed.

They catch what a transport's own checks do not: a bad page of shared memory, a faulty NIC or driver, a block that was
written over while it was read. A mismatch fails the hand-off, and the request is computed elsewhere. They are computed
in host memory, on the agent's thread, so a KV pool in GPU memory has none: copying each block to the host to sum it
would cost more than the transfer.

Off is the default and costs nothing: no library is loaded, no message sent, no block read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvbaton.kvtransfer.config import CHECKSUM_OFF
from kvbaton.kvtransfer.messages import Landing
from kvbaton.kvtransfer.transport import BlockMemory
from kvbaton.kvtransfer.wire import MAX_SUMS
from kvbaton.settings import ConfigError


@dataclass(frozen=True, slots=True)
class BlockSums:
    """The checksum of a block of one memory by its id, as an unsigned integer of at most 64 bits."""

    kind: str
    of: Callable[[int], int]


def block_sums(kind: str, memory: BlockMemory) -> BlockSums | None:
    """None for "off". Raises `ConfigError` where `kind` cannot be had: GPU memory, no library."""
    if kind == CHECKSUM_OFF:
        return None
    if memory.num_blocks and hasattr(memory.block(0), "__cuda_array_interface__"):
        raise ConfigError(f"checksum {kind} is for blocks in host memory, these are in GPU memory: use off")
    digest = _xxh3() if kind == "xxh3" else _crc32c()
    return BlockSums(kind, lambda block_id: digest(memory.block(block_id)))


def _xxh3() -> Callable[[Any], int]:
    try:
        import xxhash
    except ImportError as error:
        raise ConfigError(f"checksum xxh3 needs the package xxhash ({error})") from error
    return lambda block: int(xxhash.xxh3_64_intdigest(memoryview(block)))


def _crc32c() -> Callable[[Any], int]:
    try:
        import google_crc32c
    except ImportError as error:
        raise ConfigError(f"checksum crc32c needs the package google-crc32c ({error})") from error
    if google_crc32c.implementation != "c":
        raise ConfigError("checksum crc32c: google-crc32c has no compiled part here: use xxh3")
    return lambda block: int(google_crc32c.value(bytes(memoryview(block))))  # it takes no writable buffer


class OutgoingSums:
    """One sender's sums between their block's post and their message: a frame for each would cost more than a block."""

    def __init__(self) -> None:
        self._first = 0
        self._values: list[int] = []

    def add(self, index: int, value: int) -> None:
        """Blocks of a prompt are posted in order."""
        if not self._values:
            self._first = index
        self._values.append(value)

    @property
    def full(self) -> bool:
        return len(self._values) >= MAX_SUMS

    def take(self) -> tuple[int, tuple[int, ...]]:
        """The first block's index in the prompt, and the sums from there."""
        values, self._values = tuple(self._values), []
        return self._first, values


class LandingCheck:
    """Compares the landed blocks of one hand-off with the sender's sums, each as soon as both are there, in order."""

    def __init__(self, sums: BlockSums, landing: Landing) -> None:
        self._sums = sums
        self._landing = landing
        self._expected: deque[int] = deque()
        self._checked = 0

    @property
    def next_sum(self) -> int:
        """The prompt index of the block whose sum has to come next."""
        return self._landing.first_block + self._checked + len(self._expected)

    @property
    def checked(self) -> int:
        """Landing blocks that are there and as they were sent."""
        return self._checked

    def expect(self, values: tuple[int, ...]) -> None:
        """The sender's sums from `next_sum` on."""
        self._expected.extend(values)

    def mismatch(self, num_landed: int) -> str | None:
        """Check what can be checked of the first `num_landed` blocks. What is wrong with one; None if nothing is."""
        while self._expected and self._checked < num_landed:
            sent = self._expected.popleft()
            landed = self._sums.of(self._landing.block_ids[self._checked])
            if landed != sent:
                index = self._landing.first_block + self._checked
                return f"checksum mismatch in block {index}: {self._sums.kind} {sent:016x} sent, {landed:016x} landed"
            self._checked += 1
        return None
