"""Triton's kernels against the reference on a CUDA device, bfloat16 tensor cores included."""

from __future__ import annotations

import pytest
import torch

from kvbaton.kernels import reference
from kvbaton.kernels.backend import kernels_for
from kvbaton.kernels.meta import build_attention_meta
from support.kernel_cases import Shape, make_case
from support.triton_cases import CHECKS, Check, close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_compiled_kernels_match_the_reference(check: Check) -> None:
    check.run(torch.device("cuda"))


def test_a_captured_decode_step_stays_valid_while_contexts_grow() -> None:
    """The launch depends on the block table's width alone: a graph replayed with longer contexts must see them."""
    device, shape = torch.device("cuda"), Shape((1, 1), (600, 40), heads=8, head_dim=64, dtype=torch.bfloat16)
    case = make_case(shape, seed=1, device=device)
    kernels = kernels_for(device)
    reference.write_kv(case.k, case.v, case.kv_cache, 1, case.meta.slot_mapping)
    meta = build_attention_meta([1, 1], list(shape.context_lens), case.block_tables, shape.block_size, device, 2)
    meta.context_lens.copy_(torch.tensor([17, 3]))
    kernels.paged_attention(case.q, case.kv_cache, 1, meta, case.scale, None)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.paged_attention(case.q, case.kv_cache, 1, meta, case.scale, None)
    for lens in ([17, 3], [300, 40], [600, 21]):
        meta.context_lens.copy_(torch.tensor(lens))
        graph.replay()
        close(out, reference.paged_attention(case.q, case.kv_cache, 1, meta, case.scale, None))
