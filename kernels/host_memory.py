"""Large blocks of host memory: zero, page-aligned, and in huge pages where the system has them.

Streaming gigabytes of weights and scattered KV through 4 KiB pages costs more in address translation than in reading.
"""

from __future__ import annotations

import contextlib
import mmap

import torch


def zeroed_memory(num_bytes: int) -> torch.Tensor:  # [num_bytes] uint8
    """The operating system's zero pages: memory that nobody touches costs neither room nor time."""
    pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: the request is only a wish
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Workspace:
    """Scratch memory that grows to the largest step seen; what was in it is lost at each call."""

    def __init__(self) -> None:
        self._memory = zeroed_memory(1)

    def bytes(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, page-aligned."""
        if num_bytes > self._memory.numel():
            self._memory = zeroed_memory(num_bytes)
        return self._memory[:num_bytes]

    def pointer(self, num_bytes: int) -> int:
        """Address of at least `num_bytes`."""
        return self.bytes(num_bytes).data_ptr()
