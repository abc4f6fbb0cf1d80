"""Triton against the reference, one named check each, on whatever device they are given.

Run as a program under TRITON_INTERPRET=1 (which Triton reads when it is imported, so it needs a process of its own) it
prints one line of JSON a check. On a GPU the tests call `run_check` directly.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any
from unittest.mock import patch

import torch

from kvbaton.kernels import reference
from kvbaton.kernels.draw import DrawRows, TorchDraw
from kvbaton.kernels.quantization import FP8, storage, to_kv
from support.kernel_cases import Case, Shape, make_case

MIXED = ((1, 1, 1, 5, 40), (1, 33, 290, 40, 75))
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True, slots=True)
class Check:
    """`run(device)` raises AssertionError with the error seen. `interpreter` False: Triton's interpreter cannot do it
    (it multiplies bfloat16 tiles as bit patterns)."""

    name: str
    run: Callable[[torch.device], None]
    interpreter: bool = True


def layer(shape: Shape, device: torch.device) -> None:
    """Rope, write and the mixed attention of one step; the pools must agree slot for slot, NaN for NaN."""
    from kvbaton.kernels.triton_backend import TritonKernels

    outputs = []
    for kernels in (TritonKernels(), reference):
        case = make_case(shape, seed=7, device=device)
        fused = torch.cat((case.q, case.k, case.v), dim=1)  # strided views, as a fused projection gives
        q, k, v = fused.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        turned = kernels.rope_and_write_kv(q, k, v, case.cos, case.sin, case.kv_cache, shape.layer, case.meta)
        out = kernels.paged_attention(turned, case.kv_cache, shape.layer, case.meta, case.scale, shape.window)
        outputs.append((turned, case.kv_cache, out))
    (turned, pool, out), (want_turned, want_pool, want_out) = outputs
    close(turned, want_turned)
    assert torch.equal(pool.isnan(), want_pool.isnan()), "other slots were written"
    close(pool.nan_to_num(0.0), want_pool.nan_to_num(0.0))
    close(out, want_out)


def standalone_attention(device: torch.device) -> None:
    """The two attention kernels on their own, over part of a batch: cu_seqlens need not begin at 0."""
    from kvbaton.kernels import triton_prefill

    case, tables, lens = _written(Shape(*MIXED), device)
    args = (case.scale, None)
    rows = slice(3, 48)
    got, layer_cache = torch.empty_like(case.q[rows]), case.kv_cache[:, 1]
    triton_prefill.prefill_into(got, case.q[rows], layer_cache, tables[3:], case.meta.cu_seqlens_q[3:], lens[3:], *args)
    want = reference.ragged_prefill_attention(
        case.q[rows], case.kv_cache, 1, tables[3:], case.meta.cu_seqlens_q[3:], lens[3:], *args
    )
    close(got, want)
    got = decoded(case, tables[:3], lens[:3])
    starts = torch.arange(4, device=device)
    want = reference.ragged_prefill_attention(case.q[:3], case.kv_cache, 1, tables[:3], starts, lens[:3], *args)
    close(got, want)


def decoded(case: Case, tables: torch.Tensor, lens: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The split kernel's output for the rows from `first` on, one a context."""
    from kvbaton.kernels.triton_decode import decode_into

    q = case.q[first : first + len(lens)]
    out = torch.empty_like(q)
    decode_into(out, q, case.kv_cache[:, case.shape.layer], tables, lens, case.scale, None)
    return out


def gathered(shape: Shape, pool_dtype: torch.dtype | None, device: torch.device) -> None:
    """Contexts out of their blocks, and what attention is then given; on CUDA that attention is torch's own."""
    from kvbaton.kernels import torch_prefill

    case, _, _ = _written(shape, device)
    n, meta = case.meta.num_decodes, case.meta
    pool = case.kv_cache if pool_dtype is None else to_kv(case.kv_cache, pool_dtype)
    seen: list[tuple[torch.Tensor, ...]] = []

    def plain(q, k, v, cu_q, cu_k, longest, scale, window):  # type: ignore[no-untyped-def]
        seen.append((k, v, cu_q, cu_k, longest))
        return _rows_attend(q, k, v, cu_q.tolist(), cu_k.tolist(), scale, window)

    attention = torch_prefill.flash_attention if device.type == "cuda" else plain
    args = (case.q[n:], pool, shape.layer, meta, case.scale, shape.window)
    out = torch_prefill.gathered_prefill_attention(*args, attention)
    for k, v, cu_q, cu_k, longest in seen:
        lens, queries = meta.context_lens_host[n:], meta.query_lens[n:]
        assert (cu_q.tolist(), cu_k.tolist()) == ([0, *accumulate(queries)], [0, *accumulate(lens)])
        assert longest == (max(queries), max(lens))
        pairs = [reference.context_kv(pool, shape.layer, meta.block_tables[n + i], c) for i, c in enumerate(lens)]
        for got, which in ((k, 0), (v, 1)):
            want = torch.cat([pair[which].to(shape.dtype).transpose(0, 1) for pair in pairs])
            assert torch.equal(got, want)
    want = reference.paged_attention(case.q, pool, shape.layer, meta, case.scale, shape.window)
    close(out, want[n:])


def gathered_in_company(device: torch.device) -> None:
    """Decode rows go to the split kernel, chunks to torch; to Triton where their contexts are too long to gather."""
    from kvbaton.kernels import triton_backend

    case, _, _ = _written(replace(_BASE, dtype=torch.float16, head_dim=24), device)
    args = (case.q, case.kv_cache, 1, case.meta, case.scale, None)
    want = reference.paged_attention(*args)
    gathered: list[int] = []

    def counted(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        gathered.append(len(q))
        return want[-len(q) :]  # what it computes is checked by itself

    kernels = triton_backend.TritonKernels(max_gathered_tokens=115)
    with patch.object(triton_backend, "gathered_prefill_attention", counted):
        close(kernels.paged_attention(*args), want)
        close(triton_backend.TritonKernels(max_gathered_tokens=114).paged_attention(*args), want)
        decodes = _written(Shape((1, 1), (3, 18), head_dim=24, dtype=torch.float16), device)[0]
        args = (decodes.q, decodes.kv_cache, 1, decodes.meta, decodes.scale, None)
        close(kernels.paged_attention(*args), reference.paged_attention(*args))
    assert gathered == [45]


def _rows_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: list[int],
    cu_k: list[int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Attention over contiguous rows, sequence by sequence."""
    parts = []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        keys, values = (x[c:d].transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0).float() for x in (k, v))
        seen = reference.visible(b - a, d - c, window, q.device)
        scores = (q[a:b].transpose(0, 1).float() @ keys.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts).to(q.dtype)


def decode_alone_and_in_company(device: torch.device) -> None:
    """A row's splits follow from its own length: the same bits in a batch whose longest row needs more splits."""
    lens = (1, 17, 256, 257, 700, 1100)
    case, tables, context = _written(Shape((1,) * len(lens), lens, heads=6), device)
    together = decoded(case, tables, context)
    for i, length in enumerate(lens):
        width = -(-length // case.shape.block_size)
        alone = decoded(case, tables[i : i + 1, :width], context[i : i + 1], first=i)
        assert torch.equal(alone[0], together[i]), f"row of {length} tokens differs"


def more_tokens_than_splits(device: torch.device) -> None:
    """Beyond MAX_SPLITS * MIN_SPLIT tokens the splits grow; a context must still be covered to its last token."""
    from kvbaton.kernels import triton_decode

    lens = (triton_decode.MAX_SPLITS * triton_decode.MIN_SPLIT + 333,)
    case, tables, context = _written(Shape((1,), lens, heads=2, kv_heads=1, num_layers=2, block_size=64), device)
    want = reference.paged_attention(case.q, case.kv_cache, 1, case.meta, case.scale, None)
    close(decoded(case, tables, context), want)


def pointwise(dtype: torch.dtype, width: int, device: torch.device) -> None:
    """Norms (with strided heads as well) and SiLU; widths that are no power of two."""
    from kvbaton.kernels.triton_backend import TritonKernels

    ours, g = TritonKernels(), torch.Generator().manual_seed(width)
    x, residual, weight = (torch.randn(n, generator=g).to(device, dtype) for n in ((9, width), (9, width), (width,)))
    close(ours.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    got, want = (k.add_rms_norm(x, residual, weight, 1e-5) for k in (ours, reference))
    close(got[0], want[0])
    close(got[1], want[1])
    heads = torch.randn(9, 7, width + 16, generator=g).to(device, dtype)[:, 2:6, :width]
    close(ours.rms_norm(heads, weight, 1e-6), reference.rms_norm(heads, weight, 1e-6))
    gate_up = torch.cat((x, residual), dim=1)
    close(ours.silu_mul(gate_up), reference.silu_mul(gate_up))


def blocks(dtype: torch.dtype, device: torch.device) -> None:
    """Copies move whole blocks, bit for bit, and nothing else."""
    from kvbaton.kernels.triton_backend import TritonKernels

    ours, g = TritonKernels(), torch.Generator().manual_seed(1)
    pool = torch.randn(9, 3, 2, 2, 16, 24, generator=g).to(device, dtype)
    want = pool.clone()
    for index in (torch.int64, torch.int32):
        one, two = (torch.tensor(ids, dtype=index, device=device) for ids in ([8, 1, 4], [0, 7, 5]))
        ours.copy_blocks(pool, one, two)
        reference.copy_blocks(want, one, two)
        assert torch.equal(storage(pool), storage(want))
        ours.copy_blocks(pool, one[:0], two[:0])
        assert torch.equal(storage(pool), storage(want))


def fp8_pool(shape: Shape, exact: bool, device: torch.device) -> None:
    """Writes to a pool of 8-bit floats, saturating, and attention over it.

    `exact` avoids rounding (no rotation, K and V that e4m3 can hold): the interpreter drops the carry of a mantissa
    that rounds up to the next power of two.
    """
    from kvbaton.kernels.triton_backend import TritonKernels

    outputs = []
    for kernels in (TritonKernels(), reference):
        case = make_case(shape, seed=3, device=device)
        pool, k, v = to_kv(case.kv_cache, FP8), case.k, case.v
        cos, sin = case.cos, case.sin
        if exact:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
            k, v = (to_kv(x, FP8).to(shape.dtype) for x in (k, v))
        k[0, 0, 0], v[1, 0, 1] = 1e4, -1e4
        q = kernels.rope_and_write_kv(case.q, k, v, cos, sin, pool, shape.layer, case.meta)
        outputs.append((pool, kernels.paged_attention(q, pool, shape.layer, case.meta, case.scale, shape.window)))
    (pool, out), (want_pool, want_out) = outputs
    assert torch.equal(storage(pool), storage(want_pool)), "the pools differ"
    assert float(pool.float().nan_to_num(0.0).abs().max()) == 448.0
    close(out, want_out)


def draws(vocab: int, device: torch.device) -> None:
    """Greedy, random and cut rows over several chunks: the tokens and sums of the torch form, equal values included."""
    from kvbaton.kernels import triton_draw

    g = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(8, vocab + 3, generator=g) * 4).bfloat16().float().to(device)[:, :vocab]
    logits[0, [vocab // 2, vocab - 1]] = logits.max() + 1  # the lower id of two equal ones
    top, plain = logits.amax(-1), TorchDraw()
    whole = torch.randint(-(1 << 62), 1 << 62, (2, 8), generator=g)
    rows = DrawRows(
        seeds=whole[0].to(device),
        samples=torch.arange(8, device=device),
        positions=(whole[1] >> 20).abs().to(device),
        temperature=torch.tensor([0, 1, 0.3, 2, 0, 1, 0.7, 1.0], dtype=torch.float64, device=device),
        min_p=torch.tensor([0, 0, 0, 0, 0, 0.1, 0.01, 0], dtype=torch.float64, device=device),
        least=torch.tensor([0, 0, 0, 1 << 30, 0, 1, 1 << 44, 1 << 43], device=device),
    )
    assert torch.equal(triton_draw.argmax(logits), logits.argmax(-1))
    for cuts in (False, True):
        got = triton_draw.draw(logits, top, rows, cuts)
        assert torch.equal(got, plain.draw(logits, top, rows, cuts)), f"cuts {cuts}"
        assert got[0] == vocab // 2
    # a sum over weights whose last bit follows exp's: one a token at most
    error = (triton_draw.total_weight(logits, top, rows) - plain.total_weight(logits, top, rows)).abs()
    assert int(error.max()) <= vocab


def filled_tokens(count: int, device: torch.device) -> None:
    """Known ids stay, places become what stands there, and a draw that is missing becomes 0; nothing behind the end."""
    from kvbaton.kernels import triton_draw

    g = torch.Generator().manual_seed(count)
    drawn = torch.randint(0, 1 << 40, (count,), generator=g)
    drawn[::3] = -1
    ids = torch.where(torch.rand(count + 1, generator=g) < 0.5, -1 - torch.arange(count + 1) % count, 1 << 35)
    ours, want = ids.clone().to(device), ids.clone()
    triton_draw.fill_tokens(ours[:count], drawn.to(device))
    TorchDraw().fill_tokens(want[:count], drawn)
    assert torch.equal(ours.cpu(), want)
    assert int(want[:count].min()) >= 0


def linear(dtype: torch.dtype, device: torch.device) -> None:
    """Products with 8-bit weights against float64: few rows and many, widths that no tile divides, several parts."""
    from kvbaton.kernels.triton_linear import linear_int8

    g = torch.Generator().manual_seed(5)
    for rows, ins, outs in ((0, 64, 32), (1, 96, 40), (5, 1700, 70), (64, 600, 33), (70, 200, 130), (300, 128, 64)):
        x = torch.randn(rows, ins + 8, generator=g).to(device, dtype)[:, :ins]  # rows further apart than they are wide
        weight = torch.randint(-128, 128, (outs, ins), dtype=torch.int8, generator=g).to(device)
        scale = (torch.rand(outs, generator=g) / 500).to(device)
        bias = torch.randn(outs, generator=g).to(device, dtype)
        plain = (x.double() @ weight.double().T) * scale.double()
        for shift in (None, bias):
            want = plain if shift is None else plain + shift.double()
            got = linear_int8(x, weight, scale, shift)
            assert got.shape == want.shape
            if rows:
                close(got, want.to(dtype))


def linear_alone_and_in_company(device: torch.device) -> None:
    """A row has the same bits among few rows, and the same among many: parts are cut by the weight's shape alone."""
    from kvbaton.kernels.triton_linear import FEW_ROWS, linear_int8

    g = torch.Generator().manual_seed(6)
    x = torch.randn(300, 1100, generator=g).to(device, torch.float16)
    weight = torch.randint(-128, 128, (90, 1100), dtype=torch.int8, generator=g).to(device)
    scale = (torch.rand(90, generator=g) / 500).to(device)
    x[:, 0], x[:, -1], weight[:, -1] = 3e4, -3e4, weight[:, 0]  # cancel: the order of a sum shows in many bits
    groups = [(16, (1, 2)), (32, (17,)), (FEW_ROWS, (33,)), (256, (FEW_ROWS + 1, 129)), (300, (257,))]
    if device.type == "cuda":  # the interpreter's products of tiles of another shape may differ in the last bits
        groups += [(FEW_ROWS, (1, 2, 17)), (300, (256, FEW_ROWS + 1))]
    for most, counts in groups:
        together = linear_int8(x[:most], weight, scale)
        for count in counts:
            assert torch.equal(linear_int8(x[:count], weight, scale), together[:count]), f"{count} of {most} rows"


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Within the dtype's tolerance, relative to 1 + |want|; NaN is never close."""
    wide = want.double()
    error = float(((got.double() - wide).abs() / (1 + wide.abs())).max())
    limit = TOLERANCE[got.dtype]
    assert got.dtype == want.dtype
    assert error < limit, f"error {error:.3g}, limit {limit:.3g}"


def _written(shape: Shape, device: torch.device) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """A case whose own K and V are in the pool, its block tables and context lengths."""
    case = make_case(shape, seed=11, device=device)
    reference.write_kv(case.k, case.v, case.kv_cache, shape.layer, case.meta.slot_mapping)
    return case, case.meta.block_tables, case.meta.context_lens


_BASE = Shape(*MIXED)
_LAYERS = {
    "mixed": _BASE,
    "mixed-window": replace(_BASE, window=24),
    "mixed-float16": replace(_BASE, dtype=torch.float16),
    "window-of-one": Shape((1, 20), (40, 20), window=1),
    "window-over-splits": Shape((1, 1), (900, 300), window=600),
    "seven-heads-a-group": Shape((1, 9), (300, 40), heads=7, kv_heads=1, head_dim=24),
    "many-kv-heads": Shape((1, 9), (20, 40), heads=12, kv_heads=12, head_dim=80, block_size=32),
    "partial-rotary": Shape((1, 9), (50, 40), head_dim=32, rotary_dim=8, block_size=32),
    "head-dim-256": Shape((1, 9), (50, 40), heads=2, kv_heads=1, head_dim=256, block_size=64),
    "decode-only": Shape((1, 1), (3, 18)),
    "prefill-only": Shape((20, 70), (20, 70)),
    "one-token-of-a-prompt": Shape((20, 1, 1), (20, 70, 1)),
    "mixed-bfloat16": replace(_BASE, dtype=torch.bfloat16),
    "bfloat16-head-128": Shape((1, 1, 200), (900, 40, 300), heads=8, head_dim=128, dtype=torch.bfloat16, block_size=32),
    "bfloat16-window": Shape((1, 200), (900, 300), heads=8, head_dim=64, dtype=torch.bfloat16, window=130),
}
_NO_INTERPRETER = {name for name, shape in _LAYERS.items() if shape.dtype == torch.bfloat16}

CHECKS = (
    *(Check(name, partial(layer, shape), name not in _NO_INTERPRETER) for name, shape in _LAYERS.items()),
    Check("standalone-attention", standalone_attention),
    *(
        Check(f"gathered-{name}", partial(gathered, shape, pool))
        for name, shape, pool in (
            ("float16", replace(_BASE, dtype=torch.float16, head_dim=24), None),
            ("window", replace(_BASE, dtype=torch.float16, head_dim=24, window=24), None),
            (
                "head-80",
                Shape((20, 9), (70, 40), heads=4, kv_heads=4, head_dim=80, block_size=32, dtype=torch.float16),
                None,
            ),
            ("8-bit-pool", replace(_BASE, dtype=torch.bfloat16, head_dim=32), FP8),
        )
    ),
    Check("gathered-in-company", gathered_in_company),
    Check("decode-alone-and-in-company", decode_alone_and_in_company),
    Check("more-tokens-than-splits", more_tokens_than_splits),
    *(
        Check(f"pointwise-{width}-{dtype}", partial(pointwise, dtype, width))
        for width in (16, 96, 1100)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
    *(Check(f"blocks-{dtype}", partial(blocks, dtype)) for dtype in (torch.float32, torch.bfloat16, FP8)),
    *(Check(f"draws-{vocab}", partial(draws, vocab)) for vocab in (96, 5000)),
    *(Check(f"filled-tokens-{count}", partial(filled_tokens, count)) for count in (1, 700)),
    *(Check(f"linear-int8-{d}", partial(linear, d), d != torch.bfloat16) for d in TOLERANCE),
    Check("linear-int8-alone-and-in-company", linear_alone_and_in_company),
    Check("fp8-pool", partial(fp8_pool, _BASE, True)),
    Check("fp8-pool-float16", partial(fp8_pool, replace(_BASE, dtype=torch.float16, window=24, head_dim=24), True)),
    Check("fp8-pool-bfloat16", partial(fp8_pool, replace(_BASE, dtype=torch.bfloat16, head_dim=64), False), False),
)


def main() -> None:
    """Every check that the interpreter can do; a line of {"name", "error"} each, error null where it passed."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN: an output row left out shows
    for check in CHECKS:
        if check.interpreter:
            error = None
            try:
                check.run(torch.device("cpu"))
            except Exception:
                error = traceback.format_exc()
            sys.stdout.write(json.dumps({"name": check.name, "error": error}) + "\n")


if __name__ == "__main__":
    main()
