"""The reference and the CPU back end against a float64 oracle that knows no blocks.

Pools are poisoned with NaN and `torch.empty` is filled with NaN, so a read of an unwritten slot or an output row left
out shows as NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from kvbaton.kernels import reference
from kvbaton.kernels.backend import Kernels
from kvbaton.kernels.cpu import CpuKernels, native_attention
from kvbaton.kernels.meta import build_attention_meta
from support.kernel_cases import CPU, Case, Shape, expected_attention, expected_rope, make_case, written_slots

MIXED = ((1, 1, 1, 1, 7, 40, 1, 130), (1, 16, 33, 300, 7, 75, 18, 210))

SHAPES = {
    "mixed": Shape(*MIXED),
    "mixed-window": Shape(*MIXED, window=24),
    "window-of-one": Shape((1, 20), (40, 20), window=1),
    "window-at-block-edge": Shape((1, 1, 33), (32, 33, 65), window=16),
    "decode-only": Shape((1,) * 5, (1, 15, 16, 17, 500), heads=7, kv_heads=1, head_dim=24),
    "prefill-only": Shape((64, 65), (64, 65), heads=2, kv_heads=2, head_dim=32),
    "wide-heads": Shape((1, 9), (50, 40), heads=2, kv_heads=1, head_dim=256, block_size=64),
    "partial-rotary": Shape((1, 9), (50, 40), head_dim=32, rotary_dim=8, block_size=32),
    "bfloat16": Shape(*MIXED, dtype=torch.bfloat16),
    "float16-window": Shape(*MIXED, dtype=torch.float16, window=50),
}
# The largest error seen over 20 seeds was under a third of these.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def _nan_in_new_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels | ModuleType:
    if request.param == "reference":
        return reference
    return CpuKernels() if request.param == "torch" else native_kernels()


def native_kernels() -> CpuKernels:
    attention = native_attention()
    if attention is None:
        pytest.skip("no native library here: see the log for the reason")
    return CpuKernels(attention)


def run_layer(kernels: Kernels | ModuleType, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """(rotated q, attention output) of one layer's step."""
    shape = case.shape
    q = kernels.rope_and_write_kv(case.q, case.k, case.v, case.cos, case.sin, case.kv_cache, shape.layer, case.meta)
    out = kernels.paged_attention(q, case.kv_cache, shape.layer, case.meta, case.scale, shape.window)
    return q, out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_layer_matches_the_oracle(kernels: Kernels | ModuleType, name: str) -> None:
    """Wrong slot, wrong mask, wrong head group, unwritten slot read: each moves the result far past the tolerance."""
    case = make_case(SHAPES[name], seed=len(name))
    q, out = run_layer(kernels, case)
    want_k = expected_rope(case, case.k)
    tolerance = TOLERANCE[case.shape.dtype]
    assert error(q, expected_rope(case, case.q)) < tolerance * 4
    assert error(out, expected_attention(case, q, want_k.to(case.shape.dtype), case.v)) < tolerance
    assert out.dtype == case.shape.dtype


@pytest.mark.parametrize("name", ["mixed", "wide-heads", "partial-rotary", "bfloat16"])
def test_write_touches_exactly_the_slots_of_the_step(kernels: Kernels | ModuleType, name: str) -> None:
    """A token written to another layer, head or block would be read as someone else's context."""
    case = make_case(SHAPES[name], seed=5)
    shape = case.shape
    run_layer(kernels, case)
    alive = ~case.kv_cache.isnan()
    written = {(b, o) for b, o in alive[:, shape.layer, 0, 0, :, 0].nonzero().tolist()}
    assert written == written_slots(case)
    assert not alive[:, [i for i in range(shape.num_layers) if i != shape.layer]].any()
    assert torch.equal(alive[:, shape.layer].all(dim=(1, 2, 4)), alive[:, shape.layer, 0, 0, :, 0])
    block, offset = case.meta.slot_mapping // shape.block_size, case.meta.slot_mapping % shape.block_size
    assert torch.equal(case.kv_cache[block, shape.layer, 1, :, offset], case.v)
    key_error = error(case.kv_cache[block, shape.layer, 0, :, offset], expected_rope(case, case.k))
    assert key_error < TOLERANCE[shape.dtype] * 4


def test_strided_heads_are_read_in_place(kernels: Kernels | ModuleType) -> None:
    """q, k and v are views of one fused projection: a kernel that assumes contiguous tokens mixes up heads."""
    case = make_case(SHAPES["mixed"], seed=9)
    _, want = run_layer(kernels, make_case(SHAPES["mixed"], seed=9))
    fused = torch.cat((case.q, case.k, case.v), dim=1)
    q, k, v = fused.split([case.q.shape[1], case.k.shape[1], case.v.shape[1]], dim=1)
    shape = case.shape
    turned = kernels.rope_and_write_kv(q, k, v, case.cos, case.sin, case.kv_cache, shape.layer, case.meta)
    got = kernels.paged_attention(turned, case.kv_cache, shape.layer, case.meta, case.scale, shape.window)
    assert torch.equal(got, want)


def test_two_windows_and_two_steps_do_not_share_plans() -> None:
    """What the CPU back end keeps of a step must not leak into a layer with another window, or into the next step."""
    kernels = CpuKernels()
    for seed in (1, 2):
        case = make_case(SHAPES["mixed"], seed=seed)
        q, full = run_layer(kernels, case)
        near = kernels.paged_attention(q, case.kv_cache, 1, case.meta, case.scale, 24)
        again = kernels.paged_attention(q, case.kv_cache, 1, case.meta, case.scale, None)
        assert torch.equal(full, again)
        assert error(near, reference.paged_attention(q, case.kv_cache, 1, case.meta, case.scale, 24)) < 4e-6
        assert error(near, full) > 1e-2


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 7), (4, 1), (2, 3), (1, 12)])
def test_decode_rows_do_not_depend_on_their_batch(dtype: torch.dtype, kv_heads: int, group: int, threads: int) -> None:
    """A request's tokens must not depend on who else decodes: each row alone equals itself in company, to the bit."""
    lens = (1, 5, 16, 31, 100, 101, 260, 511, 513, 700, 900, 1030)
    shape = Shape((1,) * len(lens), lens, heads=kv_heads * group, kv_heads=kv_heads, head_dim=64, dtype=dtype)
    case = make_case(shape, seed=3)
    q, together = run_layer(CpuKernels(), case)
    for i, length in enumerate(lens):
        meta = build_attention_meta([1], [length], [case.block_tables[i]], 16, CPU, 1)
        alone = CpuKernels().paged_attention(q[i : i + 1], case.kv_cache, 1, meta, case.scale, None)
        assert torch.equal(alone[0], together[i]), f"row {i} of {length} tokens on {threads} threads"


def test_a_chunked_prompt_matches_the_whole_one() -> None:
    """Chunk boundaries must not show: 130 tokens at once against 48 + 1 + 81 over the pool."""
    whole = make_case(Shape((130,), (130,)), seed=4)
    chunks = make_case(Shape((130,), (130,)), seed=4)
    kernels = CpuKernels()
    _, want = run_layer(kernels, whole)
    parts, start = [], 0
    for n in (48, 1, 81):
        meta = build_attention_meta([n], [start + n], chunks.block_tables, 16, CPU, 0)
        rows = slice(start, start + n)
        args = (chunks.q[rows], chunks.k[rows], chunks.v[rows], chunks.cos, chunks.sin)
        q = kernels.rope_and_write_kv(*args, chunks.kv_cache, 1, meta)
        parts.append(kernels.paged_attention(q, chunks.kv_cache, 1, meta, chunks.scale, None))
        start += n
    assert error(torch.cat(parts), want) < 2e-6


@pytest.mark.parametrize("window", [1, 3, 7, 40])
def test_window_means_what_transformers_means(window: int) -> None:
    """Off by one at the window's edge is invisible in short prompts and wrong in long ones."""
    masking = pytest.importorskip("transformers.masking_utils")
    theirs = masking.sliding_window_causal_mask_function(window)
    ours = reference.visible(20, 20, window, CPU)
    for i in range(20):
        for j in range(20):
            assert bool(ours[i, j]) == bool(theirs(0, 0, torch.tensor(i), torch.tensor(j)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_and_silu_match_float64(kernels: Kernels | ModuleType, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    x, residual, weight = (torch.randn(n, generator=g).to(dtype) for n in ((5, 96), (5, 96), (96,)))
    eps, tolerance = 1e-5, {torch.float32: 2e-6, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]

    def norm(a: torch.Tensor) -> torch.Tensor:
        return a.double() / (a.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()

    assert error(kernels.rms_norm(x, weight, eps), norm(x)) < tolerance
    heads = x.view(5, 12, 8)[:, 2:7]
    assert error(kernels.rms_norm(heads, weight[:8], eps), norm_heads(heads, weight[:8], eps)) < tolerance
    normed, total = kernels.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(total, x + residual)
    assert error(normed, norm(total)) < tolerance
    gate_up = torch.cat((x, residual), dim=-1)
    want = x.double() / (1 + (-x.double()).exp()) * residual.double()
    assert error(kernels.silu_mul(gate_up), want) < tolerance
    assert torch.equal(gate_up, torch.cat((x, residual), dim=-1))


def norm_heads(heads: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = heads.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_blocks_move_whole_and_nothing_else_moves(kernels: Kernels | ModuleType, ids_dtype: torch.dtype) -> None:
    """Copy-on-write copies every layer and head of a block, and leave the other blocks alone."""
    pool = torch.arange(9 * 2 * 2 * 2 * 16 * 8, dtype=torch.float32).view(9, 2, 2, 2, 16, 8)
    before = pool.clone()
    kernels.copy_blocks(pool, torch.tensor([1, 5], dtype=ids_dtype), torch.tensor([7, 0], dtype=ids_dtype))
    assert torch.equal(pool[[7, 0]], before[[1, 5]])
    untouched = [1, 2, 3, 4, 5, 6, 8]
    assert torch.equal(pool[untouched], before[untouched])
