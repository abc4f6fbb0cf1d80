"""Every Triton kernel compiles for sm_90 on a machine without a GPU, fits an SM, and does not spill."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")

from kvbaton.kernels import aot


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before may stand in for a kernel that no longer compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("model", aot.MODELS, ids=lambda model: model.label)
def test_kernels_compile_without_spilling(model: aot.ModelShape) -> None:
    """A spill or a tile over the SM's shared memory would be found on the GPU only, as a slow or failing launch."""
    made = list(aot.compile_models([model]))
    labels = {kernel.label.removeprefix(f"{model.label} ") for kernel in made}
    assert {"decode", "decode reduce", "prefill", "add_rms_norm", "rope + kv write", "copy blocks"} <= labels
    for kernel in made:
        assert kernel.spill_bytes == 0, kernel
        assert 0 < kernel.registers <= 255, kernel
        assert kernel.shared_bytes <= aot.SHARED_LIMIT_BYTES, kernel
        assert kernel.num_warps * 32 * kernel.registers <= 65536, kernel
