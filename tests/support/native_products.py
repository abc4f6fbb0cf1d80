"""Matrix products through the C interface of a native library, and that library with its AMX path compiled in.

The AMX build runs on any x86 with bfloat16 products. Where the processor has no tiles, `tests/kernels/amx_traps.c` does
their instructions; where it has, they run for real.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kvbaton.kernels.native_build import FLAGS, LIBRARIES, SOURCES
from kvbaton.kernels.native_lib import DTYPE_CODES, ModelStruct, load_library, native_library

TRAPS = Path(__file__).parent.parent / "kernels" / "amx_traps.c"
TILES = ("-mamx-tile", "-mamx-bf16")
PANEL = 32


def compiler_with(folder: Path, *flags: str) -> str:
    """A C compiler that takes `flags`; skips the test where there is none."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    probe = folder / "probe.c"
    probe.write_text("#include <immintrin.h>\nvoid probe(void) { _tile_dpbf16ps(0, 4, 6); }\n")
    tried = subprocess.run([compiler, *flags, "-c", probe, "-o", folder / "probe.o"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"{compiler} {' '.join(flags)}: {tried.stderr.strip()[-200:]}")
    return compiler


BUILDS = {
    "own": (),
    "no byte tables": ("-mno-avx512vbmi",),
    "no bfloat16 products": ("-mno-avx512bf16",),
    "8 lanes": ("-mno-avx512f",),
    "4 lanes": ("-mno-avx512f", "-mno-avx2", "-mno-f16c"),
}


def library_for(build: str, folder: Path) -> ctypes.CDLL:
    """The library as `BUILDS` names it, compiled into `folder`; skips the test where it cannot be had."""
    library = native_library()
    if library is None:
        pytest.skip("no native library here: see the log for the reason")
    if not BUILDS[build]:
        return library
    if platform.machine() != "x86_64":
        pytest.skip("these builds are for x86")
    path, compiler = folder / "library.so", shutil.which("gcc") or "cc"
    command = [compiler, *FLAGS, "-O1", *BUILDS[build], *sorted(SOURCES.glob("*.c")), "-o", path, *LIBRARIES]
    subprocess.run(command, check=True, timeout=600)
    return load_library(path)


def build(folder: Path) -> Path:
    """Compiles the library into `folder`, with the flags of a processor that has tiles."""
    compiler = compiler_with(folder, *FLAGS, *TILES)
    path = folder / "amx.so"
    sources = [*sorted(SOURCES.glob("*.c")), TRAPS]
    command = [compiler, *FLAGS, *TILES, *sources, "-Wl,--wrap=syscall", "-o", path, *LIBRARIES]
    subprocess.run(command, check=True, timeout=600)
    return path


class Products:
    """bfloat16 products through the C interface of one library, by one team of threads."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.library = load_library(path)
        self._team = self.library.team_make(threads)

    def close(self) -> None:
        self.library.team_free(self._team)

    @property
    def description(self) -> str:
        return str(self.library.kvb_describe().decode())

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [out, in] bfloat16 -> its panels, as bytes."""
        code, (out, inputs) = DTYPE_CODES[torch.bfloat16], weight.shape
        packed = torch.zeros(self.library.kvb_packed_bytes(code, out, inputs), dtype=torch.uint8)
        self.library.kvb_pack(code, weight.contiguous().data_ptr(), packed.data_ptr(), out, inputs, 0)
        return packed

    def linear(self, x: torch.Tensor, packed: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """y [rows, out] bfloat16 = x [rows, in] times `packed`; bias [whole panels] float32."""
        (rows, inputs), out = x.shape, y.shape[1]
        added = None if bias is None else bias.data_ptr()
        tensors = (x.data_ptr(), packed.data_ptr(), added, y.data_ptr())
        self.library.kvb_linear(self._team, DTYPE_CODES[torch.bfloat16], *tensors, rows, inputs, out, None)

    def sums(self, x: torch.Tensor, packed: torch.Tensor, y: torch.Tensor) -> None:
        """y [rows, out] float32 = x [rows, in] times `packed`."""
        model = ModelStruct(
            dtype=DTYPE_CODES[torch.bfloat16], hidden=x.shape[1], vocab=y.shape[1], lm_head=packed.data_ptr()
        )
        self.library.kvb_logits(self._team, ctypes.addressof(model), x.data_ptr(), x.shape[0], y.data_ptr(), None)

    def summed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times weight [out, in] -> float32 [rows, out]."""
        y = torch.empty(x.shape[0], weight.shape[0])
        self.sums(x, self.pack(weight), y)
        return y


class Int8Products:
    """Products with 8-bit weights by one library, beside those with plain weights, by one team of threads."""

    def __init__(self, library: ctypes.CDLL, threads: int = 1) -> None:
        self._library = library
        self._team = library.team_make(threads)

    def close(self) -> None:
        self._library.team_free(self._team)

    def int8(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Kernels.linear_int8`."""
        code, (out, inputs) = DTYPE_CODES[x.dtype], weight.shape
        packed = torch.full((self._library.kvb_packed_int8_bytes(code, out, inputs),), 85, dtype=torch.uint8)
        self._library.kvb_pack_int8(code, weight.contiguous().data_ptr(), packed.data_ptr(), out, inputs, 0)
        return self._product(x, packed, out, columns(scale), None if bias is None else columns(bias))

    def plain(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [rows, in] times weight [out, in] of the same dtype -> [rows, out]."""
        code, (out, inputs) = DTYPE_CODES[x.dtype], weight.shape
        packed = torch.zeros(self._library.kvb_packed_bytes(code, out, inputs), dtype=torch.uint8)
        self._library.kvb_pack(code, weight.contiguous().data_ptr(), packed.data_ptr(), out, inputs, 0)
        return self._product(x, packed, out, None, None)

    def _product(
        self, x: torch.Tensor, packed: torch.Tensor, out: int, scale: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows, inputs = x.shape
        y = torch.full((rows, out), float("nan"), dtype=x.dtype)
        work = torch.empty(rows * inputs, dtype=torch.float32)
        pointers = [None if t is None else t.data_ptr() for t in (x, packed, scale, bias, y)]
        self._library.kvb_linear_int8(self._team, DTYPE_CODES[x.dtype], *pointers, rows, inputs, out, work.data_ptr())
        return y


def columns(values: torch.Tensor) -> torch.Tensor:
    """values [out] as float32, padded to whole panels with what must never be seen."""
    missing = -len(values) % PANEL
    return torch.nn.functional.pad(values.float(), (0, missing), value=float("nan"))
