"""8-bit weights: what the quantizer promises of every value, and products with them against float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from kvbaton.kernels import quantization, reference
from kvbaton.kernels.backend import Kernels
from kvbaton.kernels.cpu import CpuKernels
from kvbaton.kernels.quantization import quantize_into

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantized(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, scale), in memory that held something else."""
    weight = torch.full(source.shape, 77, dtype=torch.int8)
    scale = torch.full((source.shape[0],), float("nan"))
    quantize_into(source, weight, scale)
    return weight, scale


def rows(out: int, inputs: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose sizes differ by many orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.empty(out, 1).uniform_(-4, 3, generator=g)
    return (torch.randn(out, inputs, generator=g) * sizes).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (37, 96), (64, 333)])
def test_no_value_is_off_by_more_than_half_a_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Guards scale and rounding: one scale for the whole matrix, truncation or a scale of 1/128 all break the bound,
    and a row that does not use 127 wastes precision."""
    source = rows(*shape, seed=shape[1], dtype=dtype)
    weight, scale = quantized(source.clone())
    error = (source.double() - weight.double() * scale.double().unsqueeze(1)).abs().amax(1)
    assert (error <= scale.double() * (0.5 + 1e-5)).all()
    assert weight.abs().amax(1).eq(127).all()
    assert torch.equal(scale, source.float().abs().amax(1) / torch.tensor(127.0))


def test_ties_go_to_the_even_integer() -> None:
    """With a scale of exactly 1; rounding half away from zero would bias every weight that sits on a tie."""
    source = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    weight, scale = quantized(source)
    assert scale.tolist() == [1.0]
    assert weight.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_extremes() -> None:
    """Rows of zeros divide by nothing, the smallest floats stay integers, and -128 never occurs."""
    largest, tiny = 3e38, 1e-45  # `tiny` / 127 is 0
    source = torch.tensor([[0.0, -0.0], [largest, -largest], [tiny, 0.0], [1e-38, -3e-39], [-5.0, 4.99]])
    weight, scale = quantized(source)
    assert weight.tolist()[:3] == [[0, 0], [127, -127], [0, 0]]
    assert weight.tolist()[4] == [-127, 127]
    assert int(weight.min()) == -127
    assert scale[0] == 0.0
    assert torch.allclose(weight * scale.unsqueeze(1), source, rtol=0.005, atol=2e-38)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    """One NaN would silently make a whole row zeros."""
    source = torch.ones(5, 3)
    source[3, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantized(source)


def test_pieces_and_views_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix is quantized a few rows at a time, into parts of a larger one, and its source is left as it was."""
    source = rows(29, 50, seed=4)
    kept = source.clone()
    want = quantized(source)
    monkeypatch.setattr(quantization, "_CHUNK_ELEMENTS", 150)
    weight, scale = torch.full((40, 50), 9, dtype=torch.int8), torch.full((40,), 9.0)
    quantize_into(source, weight[5:34], scale[5:34])
    assert torch.equal(weight[5:34], want[0])
    assert torch.equal(scale[5:34], want[1])
    assert weight[:5].eq(9).all()
    assert weight[34:].eq(9).all()
    assert torch.equal(source, kept)


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels | ModuleType:
    return reference if request.param == "reference" else CpuKernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_product_is_rounded_once(
    kernels: Kernels | ModuleType, dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: the sum, the scale and the bias are float32, and only the result has x's dtype. A scale that is
    applied to another output, or a product in 16 bits, is off by far more than one rounding."""
    monkeypatch.setattr(reference, "_OUTPUTS", 16)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(7, 200, generator=g).to(dtype)
    weight, scale = quantized(rows(45, 200, seed=6))
    bias = torch.randn(45, generator=g).to(dtype) if with_bias else None
    got = kernels.linear_int8(x, weight, scale, bias)
    want = x.double() @ (weight.double() * scale.double().unsqueeze(1)).T + (0 if bias is None else bias.double())
    size = (x.double().abs() @ (weight.double().abs() * scale.double().unsqueeze(1)).T).abs()
    assert got.dtype is dtype
    limit = torch.finfo(dtype).eps / 2 * want.abs() + 4e-6 * size  # float32 sums of 200 products
    assert bool(((got.double() - want).abs() <= limit).all())
