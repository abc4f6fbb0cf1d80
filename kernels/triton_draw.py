# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Drawing tokens on the device: one pass over the logits, noise and cuts made in registers. See `draw` for what it is.

grid (row, chunk of the vocabulary) -> best value and its token id a chunk; then the best chunk of each row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvbaton.kernels.draw import DrawRows

CHUNK = 2048
NUM_WARPS = 8
FILL_ROWS, FILL_WARPS = 256, 4


@triton.jit
def _key(seed, sample, position):
    """64 random bits of (seed, sample, position), each uint64: two words of Philox4x32-10."""
    c0, c1 = position & 0xFFFFFFFF, position >> 32
    c2, c3 = sample & 0xFFFFFFFF, sample >> 32
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in tl.static_range(10):
        left = c0 * 0xD2511F53
        right = c2 * 0xCD9E8D57
        c0 = (right >> 32) ^ c1 ^ k0
        c2 = (left >> 32) ^ c3 ^ k1
        c1 = right & 0xFFFFFFFF
        c3 = left & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0 | (c1 << 32)


@triton.jit
def _gumbel(key, token):
    """Standard Gumbel noise float64 of token ids (uint64): numbers of the SplitMix64 sequence that `key` begins."""
    z = key + (token + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    uniform = ((z >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _scores(logits_ptr, top_ptr, temperature_ptr, row, token, row_stride, inside):
    heat = tl.load(temperature_ptr + row)
    logits = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float64)
    return (logits - tl.load(top_ptr + row).to(tl.float64)) / tl.where(heat > 0, heat, 1.0)


@triton.jit
def _weights(scores):
    return (tl.exp(scores) * 17592186044416.0).to(tl.int64)


@triton.jit
def draw_kernel(
    logits_ptr,  # [rows, vocab] float32, vocab contiguous
    top_ptr,  # [rows] float32
    seeds_ptr,  # [rows] int64; likewise samples, positions, least
    samples_ptr,
    positions_ptr,
    temperature_ptr,  # [rows] float64; likewise min_p
    min_p_ptr,
    least_ptr,
    best_ptr,  # [rows, chunks] float64
    token_ptr,  # [rows, chunks] int64
    row_stride,
    vocab,
    chunks,
    RANDOM: tl.constexpr,
    CUTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    if RANDOM:
        values = _scores(logits_ptr, top_ptr, temperature_ptr, row, token, row_stride, inside)
        if CUTS:
            kept = _weights(values) >= tl.load(least_ptr + row)
            kept = kept & (tl.exp(values) >= tl.load(min_p_ptr + row)) & inside
        seed, sample = tl.load(seeds_ptr + row).to(tl.uint64), tl.load(samples_ptr + row).to(tl.uint64)
        key = _key(seed, sample, tl.load(positions_ptr + row).to(tl.uint64))
        noisy = tl.load(temperature_ptr + row) > 0
        values += tl.where(noisy, _gumbel(key, token.to(tl.uint64)), 0.0)
        if CUTS:
            values = tl.where(kept, values, float("-inf"))
    else:
        values = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=float("-inf")).to(tl.float64)
    best, at = tl.max(values, axis=0, return_indices=True)
    tl.store(best_ptr + row * chunks + chunk, best)
    tl.store(token_ptr + row * chunks + chunk, (chunk * CHUNK + at).to(tl.int64))


@triton.jit
def total_weight_kernel(
    logits_ptr,  # [rows, vocab] float32, vocab contiguous
    top_ptr,  # [rows] float32
    temperature_ptr,  # [rows] float64; likewise min_p
    min_p_ptr,
    sum_ptr,  # [rows, chunks] int64
    row_stride,
    vocab,
    chunks,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab
    scores = _scores(logits_ptr, top_ptr, temperature_ptr, row, token, row_stride, inside)
    kept = inside & (tl.exp(scores) >= tl.load(min_p_ptr + row))
    tl.store(sum_ptr + row * chunks + chunk, tl.sum(tl.where(kept, _weights(scores), 0), axis=0))


@triton.jit
def fill_tokens_kernel(
    token_ids_ptr,  # [count] int64
    drawn_ptr,  # [draws] int64
    count,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(token_ids_ptr + row, mask=row < count, other=0)
    unknown = token < 0
    drawn = tl.load(drawn_ptr + (-1 - token), mask=unknown, other=0)
    tl.store(token_ids_ptr + row, tl.maximum(drawn, 0), mask=unknown)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[rows] int64; see `DrawKernels`."""
    return _draw(logits, (logits,) * 7, random=False, cuts=False)


def draw(logits: torch.Tensor, top: torch.Tensor, rows: DrawRows, cuts: bool) -> torch.Tensor:
    """[rows] int64; see `DrawKernels`."""
    inputs = (top, rows.seeds, rows.samples, rows.positions, rows.temperature, rows.min_p, rows.least)
    return _draw(logits, inputs, random=True, cuts=cuts)


def _draw(logits: torch.Tensor, inputs: tuple[torch.Tensor, ...], random: bool, cuts: bool) -> torch.Tensor:
    """`inputs` are top and the rows' tensors in the kernel's order; greedy batches read none of them."""
    count, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    best = torch.empty((count, chunks), dtype=torch.float64, device=logits.device)
    token = torch.empty((count, chunks), dtype=torch.int64, device=logits.device)
    draw_kernel[(count, chunks)](
        logits, *inputs, best, token, logits.stride(0), vocab, chunks,
        RANDOM=random, CUTS=cuts, CHUNK=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return token.gather(1, best.argmax(-1, keepdim=True)).squeeze(1)


def total_weight(logits: torch.Tensor, top: torch.Tensor, rows: DrawRows) -> torch.Tensor:
    """[rows] int64; see `DrawKernels`."""
    count, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    sums = torch.empty((count, chunks), dtype=torch.int64, device=logits.device)
    total_weight_kernel[(count, chunks)](
        logits, top, rows.temperature, rows.min_p, sums, logits.stride(0), vocab, chunks, CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums.sum(-1)


def fill_tokens(token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
    """In place; see `DrawKernels`."""
    count = token_ids.shape[0]
    fill_tokens_kernel[(triton.cdiv(count, FILL_ROWS),)](token_ids, drawn, count, ROWS=FILL_ROWS, num_warps=FILL_WARPS)
