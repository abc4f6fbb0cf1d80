"""Native decoders to the last bit: prompts in any chunks, and generated tokens one by one or many in one pass.

Hidden states, logits and KV, also as built for processors with fewer instructions.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kvbaton.engine.model.native_decoder import NativeDecoder
from kvbaton.kernels.meta import build_attention_meta
from support.decoder_cases import CONFIGS, CPU, Step, make_step, plain
from support.native_products import BUILDS, library_for

pytestmark = [pytest.mark.process, pytest.mark.slow]

PROMPT, TOTAL = 530, 600  # more than the keys that attention takes at once


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return library_for(request.param, tmp_path_factory.mktemp("native"))


def in_pieces(step: Step, decoder: NativeDecoder, pool: torch.Tensor, passes: list[list[tuple[int, int]]]) -> list:
    """Logits of passes of pieces from..to; those past the prompt are decodes."""
    made = []
    for pieces in passes:
        lens, ends = [to - at for at, to in pieces], [to for _, to in pieces]
        decodes = sum(at >= PROMPT for at, _ in pieces)
        meta = build_attention_meta(lens, ends, list(step.tables) * len(pieces), 16, CPU, decodes)
        ids = torch.cat([step.ids[at:to] for at, to in pieces])
        made += replace(step, ids=ids, meta=meta, pool=pool).run(decoder).split(lens)
    return made


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["gqa", "window"])
def test_a_position_has_one_result(library: ctypes.CDLL, name: str, dtype: str) -> None:
    """A resume computes its emitted tokens in one pass, a stream one by one; chunks of a prompt end anywhere."""
    decoder = NativeDecoder(plain(CONFIGS[name], dtype), library)
    step = make_step(CONFIGS[name], 4, sequences=((TOTAL, TOTAL),)).copy(getattr(torch, dtype))
    single = [[(at, at + 1)] for at in range(PROMPT, TOTAL)]
    one_by_one, pool = step.pool.clone(), step.pool.clone()
    want = torch.cat(in_pieces(step, decoder, one_by_one, [[(0, PROMPT)], *single]))
    borders = [0, 1, 17, 100, 101, 500, 529, PROMPT]
    chunks = [[piece] for piece in pairwise(borders[:-1])]
    last = [*(piece for (piece,) in single[:40]), (529, PROMPT)]
    got = in_pieces(step, decoder, pool, [*chunks, last, [piece for (piece,) in single[40:]]])
    end = got.pop(len(chunks) + 40)  # of the prompt, behind the decodes of its pass
    assert torch.equal(torch.cat([*got[: len(chunks)], end, *got[len(chunks) :]]), want)
    assert torch.equal(pool.nan_to_num(), one_by_one.nan_to_num())
