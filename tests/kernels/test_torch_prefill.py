"""Torch's flash attention has no CPU form, but what its operator takes and gives is known without a device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed on this platform")

from kvbaton.kernels.torch_prefill import flash_attention


@pytest.mark.parametrize("window", [None, 24])
def test_the_operator_takes_what_it_is_given(window: int | None) -> None:
    """Guards names and order of the arguments, over the versions of torch, before a GPU sees them."""
    q, k, v = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((45, 4, 64), *[(115, 2, 64)] * 2))
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    out = flash_attention(q, k, v, cu, cu, (40, 75), 0.125, window)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)


def test_window_and_causality_are_the_operator_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of w keys ends at the query's own: w - 1 on its left, none on its right. Without one, causal."""
    seen: list[dict[str, object]] = []

    def recorded(*args: object, **kwargs: object) -> tuple[torch.Tensor]:
        seen.append({"causal": args[8], **kwargs})
        return (torch.zeros(1),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", recorded)
    x = torch.zeros(1)
    for window in (None, 24):
        flash_attention(x, x, x, x, x, (1, 1), 0.5, window)
    assert seen == [
        {"causal": True, "scale": 0.5, "window_size_left": -1, "window_size_right": 0},
        {"causal": False, "scale": 0.5, "window_size_left": 23, "window_size_right": 0},
    ]
