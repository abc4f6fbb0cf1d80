"""Every Triton kernel compiles for sm_90 on a machine without a GPU, fits an SM, and does not spill."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

from kvbaton.engine.config import GPU_BLOCK_SIZE
from kvbaton.kernels import triton_decode
from support import triton_aot as aot

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before may stand in for a kernel that no longer compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("spec", list(aot.all_specs(aot.MODELS)), ids=lambda spec: spec.label)
def test_kernel_compiles_without_spilling(spec: aot.KernelSpec) -> None:
    """A spill or a tile over the SM's shared memory would be found on the GPU only, as a slow or failing launch."""
    made = aot.compile_spec(spec)
    assert made.spill_bytes == 0, made
    assert 0 < made.registers <= 255, made
    assert made.shared_bytes <= aot.SHARED_LIMIT_BYTES, made
    assert made.num_warps * 32 * made.registers <= 65536, made


def test_every_kernel_is_among_them() -> None:
    """A kernel added without a spec would never be compiled before a GPU sees it."""
    folder = Path(triton_decode.__file__).parent
    modules = [import_module(f"kvbaton.kernels.{file.stem}") for file in folder.glob("triton_*.py")]
    launched = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert launched == {spec.kernel.__name__ for spec in aot.all_specs(aot.MODELS)}


def test_the_shapes_have_the_blocks_that_engines_have() -> None:
    """Attention compiles anew for each block size: a new default must be compiled here before a GPU sees it."""
    assert aot.MODELS[0].block_size == GPU_BLOCK_SIZE
    assert len({model.block_size for model in aot.MODELS}) >= 3


def test_a_kernel_that_spills_is_reported_as_such() -> None:
    """The figures must come from the compiler: float32 tiles of twice the size, on half the
    warps, cannot stay in registers."""
    spec = next(s for s in aot.all_specs(aot.MODELS) if s.label == "fp32-d128 prefill")
    grown = tuple((name, value * 2 if name == "BLOCK_N" else value) for name, value in spec.constants)
    assert aot.compile_spec(replace(spec, constants=grown, num_warps=4)).spill_bytes > 0
