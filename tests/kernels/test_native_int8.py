"""Native products with 8-bit weights: exact integers, the sums of plain weights, and no row that depends on another.

The library is also compiled for processors without byte tables, without bfloat16 products, and with shorter vectors, as
far as this machine can run it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvbaton.kernels.native_lib import native_library
from support.native_products import BUILDS, Int8Products, library_for

pytestmark = pytest.mark.process

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows of one and of several tiles, past a block of kept sums; inputs of less than a slice, whole ones, and a rest
SHAPES = ((1, 2, 1), (3, 96, 31), (12, 256, 33), (13, 258, 64), (33, 770, 100), (260, 512, 40))


@pytest.fixture(scope="module", params=BUILDS)
def products(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Int8Products]:
    made = Int8Products(library_for(request.param, tmp_path_factory.mktemp("native")))
    yield made
    made.close()


def integers(out: int, inputs: int, seed: int) -> torch.Tensor:
    """[out, in] int8, extremes and zeros among them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (out, inputs), generator=g, dtype=torch.int8)


def values(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(inputs)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_at_every_place(products: Int8Products, dtype: torch.dtype) -> None:
    """One weight alone is multiplied by 1, so an integer that converts to another number, or a place that is packed
    and read differently, shows itself."""
    inputs, out = 256, 64
    weight = torch.arange(out * inputs).view(out, inputs).mul(37).remainder(255).sub(127).to(torch.int8)
    assert weight.unique().tolist() == list(range(-127, 128))
    got = products.int8(torch.eye(inputs, dtype=dtype), weight, torch.ones(out))
    assert torch.equal(got, weight.T.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_of_plain_weights(
    products: Int8Products, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """To the bit: integers are exact in every dtype, so the same chain of multiply-adds must come out the same."""
    rows, inputs, out = shape
    x, weight = values(rows, inputs, dtype), integers(out, inputs, rows)
    assert torch.equal(products.int8(x, weight, torch.ones(out)), products.plain(x, weight.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_scale_and_bias_come_after_the_sum(products: Int8Products, dtype: torch.dtype, with_bias: bool) -> None:
    """Against float64, with scales that differ by orders of magnitude: each belongs to its own output."""
    g = torch.Generator().manual_seed(3)
    x, weight = values(20, 300, dtype), integers(75, 300, 5)
    scale = 10.0 ** torch.empty(75).uniform_(-4, 1, generator=g)
    bias = torch.randn(75, generator=g) if with_bias else None
    got = products.int8(x, weight, scale, bias)
    exact = weight.double() * scale.double().unsqueeze(1)
    want = x.double() @ exact.T + (0 if bias is None else bias.double())
    limit = torch.finfo(dtype).eps / 2 * want.abs() + 4e-6 * (x.double().abs() @ exact.abs().T)
    assert bool(((got.double() - want).abs() <= limit).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(products: Int8Products, dtype: torch.dtype) -> None:
    """To the bit, for every number of rows up to three tiles, and among 500: only the first tile converts."""
    x, weight = values(500, 514, dtype), integers(40, 514, 8)
    scale = torch.rand(40, generator=torch.Generator().manual_seed(1))
    whole = products.int8(x, weight, scale)
    for count in (*range(1, 38), 241):
        assert torch.equal(products.int8(x[500 - count :], weight, scale), whole[500 - count :]), f"{count} rows"


def test_threads_change_nothing() -> None:
    library = native_library()
    if library is None:
        pytest.skip("no native library here: see the log for the reason")
    x, weight = values(700, 770, torch.bfloat16), integers(100, 770, 8)
    scale = torch.rand(100, generator=torch.Generator().manual_seed(1))
    results = []
    for threads in (1, 3):
        products = Int8Products(library, threads)
        results.append(products.int8(x, weight, scale))
        products.close()
    assert torch.equal(*results)
