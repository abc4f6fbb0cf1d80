"""The step on the device: real weights, ragged batches, tokens equal to transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kvbaton.engine import runner
from kvbaton.engine.batch import BatchLayout, ScheduledRow
from kvbaton.engine.config import CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.kernels.meta import AttentionMeta
from support.engine_driver import EngineDriver, output
from support.oracle import TinyModels, oracle_logits, prompts

TOKENS = 16

OracleTokens = Callable[[Path, list[int], int], list[int]]


@pytest.fixture
def folder(tiny_model: TinyModels) -> Path:
    return tiny_model("llama")


@pytest.fixture
def driver(folder: Path) -> Iterator[EngineDriver]:
    drive = EngineDriver(Engine.load(EngineConfig(folder, cache=CacheConfig(kv_memory_bytes=4 << 20))))
    yield drive
    drive.finish()


@pytest.mark.parametrize("chunk", [1, 16, 64, 1000])
def test_chunked_prefill_then_decode_equals_transformers(
    driver: EngineDriver, folder: Path, oracle_tokens: OracleTokens, chunk: int
) -> None:
    """Guards positions, slots and last-token selection on and off block borders, chunks of one token included."""
    prompt = prompts()[3]
    seq = driver.add(prompt)
    driver.prefill(seq, chunk)
    driver.decode(TOKENS, seq)
    assert output(seq) == oracle_tokens(folder, prompt, TOKENS)


def test_a_mixed_step_equals_transformers(driver: EngineDriver, folder: Path, oracle_tokens: OracleTokens) -> None:
    """Guards the ragged batch in every row order: inner chunks, last chunks and decode rows in one step."""
    texts = prompts()
    decoding, ending, inner, whole = (driver.add(texts[i]) for i in (1, 4, 6, 2))
    driver.prefill(decoding, 1000)
    driver.step((ending, 40))
    driver.step((inner, 33), (decoding, 1), (ending, 35), (whole, 32))
    result = driver.step((whole, 1), (inner, 1), (decoding, 1), (ending, 1))
    assert [len(drawn) for drawn in result.sampled] == [1, 0, 1, 1]
    driver.prefill(inner, 100)
    driver.decode(TOKENS, inner, whole, ending, decoding)
    for seq in driver.seqs:
        assert output(seq) == oracle_tokens(folder, list(seq.request.prompt), TOKENS)


def test_a_position_decides_how_its_token_is_computed(driver: EngineDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions past the prompt are decodes of one token, several of a row in one pass as well; those of the prompt
    are not, in a piece of one token neither: else a resumed stream would differ in its last bits."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    decoder = driver.engine._runner._decoder
    forward = decoder.forward

    def spy(token_ids: torch.Tensor, kv_cache: torch.Tensor, meta: AttentionMeta) -> torch.Tensor:
        seen.append((meta.num_decodes, meta.query_lens))
        return forward(token_ids, kv_cache, meta)

    monkeypatch.setattr(decoder, "forward", spy)
    one, two, three = (driver.add(prompts()[i]) for i in (1, 2, 3))
    driver.step((one, 16), (two, 31))
    driver.step((three, 20), (one, 1), (two, 1))
    driver.step((three, 1), (one, 1), (two, 1))
    assert seen == [(0, (16, 31)), (0, (20, 1, 1)), (2, (1, 1, 1))]
    one.tokens.extend((30, 31, 32))
    two.tokens.extend((40, 41))
    one.num_computed = one.num_prompt - 2
    driver.step((one, 7), (three, 1), (two, 3))
    assert seen[3:] == [(8, (1,) * 8 + (2, 1))]


class Marked:
    """Stands for an event of the device."""

    def __init__(self, story: list[str]) -> None:
        self._story = story
        story.append("marked")

    def synchronize(self) -> None:
        self._story.append("waited")


@pytest.mark.parametrize("count", [5, 12])
def test_a_step_has_landed_when_its_device_is_through(
    driver: EngineDriver, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """An inner chunk draws nothing that could be waited for: without a mark behind it its blocks would go to a peer
    while the device still writes them."""
    story: list[str] = []
    inner = driver.engine._runner._forward

    def forward(rows: list[ScheduledRow], layout: BatchLayout) -> torch.Tensor:
        story.append("computed")
        return inner(rows, layout)

    monkeypatch.setattr(driver.engine._runner, "_forward", forward)
    monkeypatch.setattr(runner, "mark_of", lambda device: Marked(story))
    seq = driver.add(range(5, 17))
    step = driver.engine.launch([ScheduledRow(seq, count, (0,) if count == 12 else ())])
    assert story == ["computed", "marked"]
    step.wait()
    assert story == ["computed", "marked", "waited"]


def test_sixteen_at_once_equal_transformers(driver: EngineDriver, folder: Path, oracle_tokens: OracleTokens) -> None:
    """Guards full batches: no row reads another's blocks, sampled neighbours change nothing."""
    texts = [prompts()[i % 7][: 40 + i] for i in range(16)]
    seqs = [driver.add(text, temperature=float(i % 2), seed=i) for i, text in enumerate(texts)]
    driver.step(*((seq, seq.num_prompt) for seq in seqs))
    driver.decode(TOKENS, *seqs)
    for i in range(0, 16, 2):
        assert output(seqs[i]) == oracle_tokens(folder, texts[i], TOKENS)
    for i in range(1, 16, 2):
        alone = driver.add(texts[i], temperature=1.0, seed=i)
        driver.prefill(alone, 64)
        driver.decode(TOKENS, alone)
        assert output(seqs[i]) == output(alone)


def test_a_cached_prefix_is_not_computed_again(driver: EngineDriver, folder: Path, oracle_tokens: OracleTokens) -> None:
    """Guards reuse: blocks of an earlier prompt give the same tokens, and only the rest is run."""
    prompt, size = prompts()[5], driver.engine.kv.block_size
    first = driver.add(prompt)
    driver.prefill(first, 1000)
    full = (len(prompt) - 1) // size
    driver.engine.kv.commit(first.hashes(size, full), first.block_table[:full])
    again = driver.add(prompt)
    driver.engine.kv.release(again.block_table)
    again.block_table = driver.engine.kv.match(again.hashes(size, full)) + driver.engine.kv.allocate(1)
    again.num_computed = full * size
    driver.step((again, len(prompt) - full * size))
    driver.decode(TOKENS, again)
    assert again.block_table[:full] == first.block_table[:full]
    assert output(again) == oracle_tokens(folder, prompt, TOKENS)


def test_samples_of_a_prompt_are_drawn_from_one_row(driver: EngineDriver) -> None:
    """Guards n > 1: sixteen draws of the last chunk equal sixteen requests of one sample each."""
    prompt = prompts()[1]
    many = driver.add(prompt, samples=tuple(range(16)), temperature=1.0, seed=4, n=16)
    drawn = driver.step((many, len(prompt))).sampled[0]
    singles = [driver.add(prompt, samples=(i,), temperature=1.0, seed=4) for i in range(16)]
    alone = driver.step(*((seq, len(prompt)) for seq in singles)).sampled
    assert [one.token_id for one in drawn] == [one[0].token_id for one in alone]
    assert len({one.token_id for one in drawn}) > 1


@pytest.mark.parametrize("chunk", [1, 7, 50])
@pytest.mark.parametrize("batch", [3, 128])
def test_prompt_logprobs_equal_transformers(
    driver: EngineDriver, folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, batch: int
) -> None:
    """Guards the shift by one, over chunk borders and over the slices in which logits are made."""
    monkeypatch.setattr(runner, "LOGPROB_ROWS", batch)
    prompt = prompts()[3]
    seq, silent = driver.add(prompt, prompt_logprobs=2), driver.add(prompts()[0])
    found = []
    while seq.num_computed < len(prompt):
        rows = [(seq, min(chunk, len(prompt) - seq.num_computed))]
        rows += [(silent, 1)] if silent.num_computed < len(silent.tokens) else []
        result = driver.step(*rows)
        found += result.prompt_logprobs[0] or ()
        assert result.prompt_logprobs[1:] in ([], [None])
    wanted = torch.log_softmax(oracle_logits(folder, prompt), -1)
    assert len(found) == len(prompt)
    assert found[0] is None
    for position, entry in enumerate(found[1:], start=1):
        assert entry is not None
        assert entry.logprob == pytest.approx(wanted[position - 1, prompt[position]].item(), abs=1e-3)
        best = wanted[position - 1].topk(2)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert len(driver.engine._runner._tails) == 0
    assert driver.step((seq, 1)).prompt_logprobs == [None]


def test_tails_live_no_longer_than_their_sequence(driver: EngineDriver) -> None:
    """Guards against a leak: prompts aborted between two chunks must leave nothing in the runner."""
    seq = driver.add(prompts()[3], prompt_logprobs=0)
    driver.step((seq, 10))
    tails = driver.engine._runner._tails
    assert len(tails) == 1
    assert tails[seq].untyped_storage().nbytes() == 4 * tails[seq].numel()  # and not the whole chunk's states
    driver.engine.kv.release(seq.block_table)
    driver.seqs.clear()
    del seq
    assert len(tails) == 0


def test_a_step_with_too_few_blocks_is_refused(driver: EngineDriver) -> None:
    """Guards memory: a scheduler's mistake must not write into somebody else's block."""
    seq = driver.add(prompts()[2])
    row = ScheduledRow(seq, 32, (0,))
    kept, seq.block_table = seq.block_table, seq.block_table[:1]
    with pytest.raises(ValueError, match="1 of 2 blocks"):
        driver.engine.launch([row]).wait()
    seq.block_table = kept
