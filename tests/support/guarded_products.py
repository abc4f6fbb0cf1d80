"""Products whose inputs and outputs end where memory ends, and then begin where it begins; prints "equal".

    python guarded_products.py LIBRARY

Every tensor has pages around it that cannot be touched: one byte past an end is a fault that ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch

from support.native_products import PANEL, Products

PAGE, PROT_NONE = mmap.PAGESIZE, 0
SHAPES = ((1, 1, 1), (1, 33, 40), (2, 31, 33), (15, 64, 32), (17, 65, 31), (33, 97, 64), (40, 130, 70), (100, 530, 40))


class Fenced:
    """A copy of a tensor between two pages that cannot be touched; `at_end` puts it against the second."""

    def __init__(self, tensor: torch.Tensor, at_end: bool) -> None:
        size = tensor.numel() * tensor.element_size()
        pages = -(-size // PAGE)
        self._memory = mmap.mmap(-1, (pages + 2) * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        for fence in (address, address + (pages + 1) * PAGE):
            if libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        offset = PAGE + (pages * PAGE - size if at_end else 0)
        self.tensor = torch.frombuffer(self._memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        self.tensor = self.tensor.view(tensor.shape)
        self.tensor.copy_(tensor)


def main(library: str) -> None:
    products = Products(Path(library))
    g = torch.Generator().manual_seed(1)
    for rows, inputs, out in SHAPES:
        x, weight = (torch.randn(n, inputs, generator=g).bfloat16() for n in (rows, out))
        packed, bias = products.pack(weight), torch.randn(-(-out // PANEL) * PANEL, generator=g)
        rounded, summed = torch.zeros(rows, out).bfloat16(), torch.zeros(rows, out)
        products.linear(x, packed, rounded, bias)
        products.sums(x, packed, summed)
        for at_end in (True, False):
            kept = [Fenced(t, at_end) for t in (x, packed, bias, torch.zeros_like(rounded), torch.zeros_like(summed))]
            fx, fw, fb, fr, fs = (fenced.tensor for fenced in kept)
            products.linear(fx, fw, fr, fb)
            products.sums(fx, fw, fs)
            if not (torch.equal(fr, rounded) and torch.equal(fs, summed)):
                raise SystemExit(f"{rows} x {inputs} x {out}: other results between fences")
    sys.stdout.write("equal\n")


if __name__ == "__main__":
    main(sys.argv[1])
