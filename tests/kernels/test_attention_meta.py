"""AttentionMeta: slots, positions and padding of a ragged batch."""

from __future__ import annotations

import pytest
import torch

from kvbaton.kernels.meta import build_attention_meta

CPU = torch.device("cpu")


def test_mixed_batch_maps_every_token_to_its_own_slot() -> None:
    """Guards against a chunk that starts at the block boundary instead of at its sequence's computed length."""
    meta = build_attention_meta([1, 1, 5, 2], [3, 17, 19, 2], [[1], [2, 3], [4, 5, 9], [7]], 16, CPU, 2)
    assert meta.positions.tolist() == [2, 16, 14, 15, 16, 17, 18, 0, 1]
    assert meta.slot_mapping.tolist() == [18, 48, 78, 79, 80, 81, 82, 112, 113]
    assert meta.block_tables.tolist() == [[1, 0], [2, 3], [4, 5], [7, 0]]
    assert meta.cu_seqlens_q.tolist() == [0, 1, 2, 7, 9]
    assert meta.context_lens.tolist() == [3, 17, 19, 2]
    assert (meta.num_decodes, meta.num_tokens, meta.num_seqs) == (2, 9, 4)
    assert (meta.query_lens, meta.context_lens_host) == ((1, 1, 5, 2), (3, 17, 19, 2))
    assert (meta.max_context_len, meta.block_size) == (19, 16)


def test_types_are_those_that_kernels_index_with() -> None:
    meta = build_attention_meta([1, 4], [1, 4], [[1], [2]], 16, CPU, 1)
    assert meta.positions.dtype == meta.slot_mapping.dtype == torch.int64
    assert meta.block_tables.dtype == meta.cu_seqlens_q.dtype == meta.context_lens.dtype == torch.int32
    assert meta.block_tables.is_contiguous()


@pytest.mark.parametrize(
    ("num_decodes", "good"), [(0, True), (1, True), (2, True), (3, False), (5, False), (-1, False)]
)
def test_decodes_are_leading_pieces_of_one_token(num_decodes: int, good: bool) -> None:
    """As many as the caller says, a piece of a prompt may have one token too; more would read from the wrong row."""
    lens, contexts, tables = [1, 1, 3, 1], [4, 5, 3, 1], [[1], [1], [2], [3]]
    if good:
        assert build_attention_meta(lens, contexts, tables, 16, CPU, num_decodes).num_decodes == num_decodes
        return
    with pytest.raises(ValueError, match=f"{num_decodes} decode pieces of one query in"):
        build_attention_meta(lens, contexts, tables, 16, CPU, num_decodes)


def test_empty_batch_has_no_rows() -> None:
    meta = build_attention_meta([], [], [], 16, CPU, 0)
    assert (meta.num_tokens, meta.num_seqs, meta.cu_seqlens_q.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    ("query_lens", "context_lens", "tables", "message"),
    [
        ([1, 0], [5, 5], [[1], [2]], "piece 1: 0 queries in a context of 5"),
        ([6], [5], [[1]], "piece 0: 6 queries in a context of 5"),
        ([1], [17], [[1]], "1 of 2 blocks"),
        ([1], [5, 6], [[1]], "1 query lengths, 2 context lengths, 1 block tables"),
    ],
)
def test_a_batch_that_would_read_foreign_blocks_is_refused(
    query_lens: list[int], context_lens: list[int], tables: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_attention_meta(query_lens, context_lens, tables, 16, CPU, 0)
