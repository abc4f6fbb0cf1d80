"""Steps that overlap: what is scheduled before the last tokens are known, and every kind of end with a row on its way.

The toy device works as late as it may, so a block that is given back before a row has landed gets that row's token
written into its next use. Block books are audited after every step.
"""

from __future__ import annotations

from typing import Any

import pytest

from kvbaton.cluster.host.step_loop import StepLoop
from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.handoff_payload import encode_first_tokens
from kvbaton.engine.orders import Abort, LegKind, Migrate, MigrationOrdered
from kvbaton.engine.request import FinishReason
from kvbaton.kvtransfer.messages import Granted, HandoffKey, Landed, Landing, Offer, Offered, Released
from support.recording_agent import RecordingAgent
from support.toy_engine import PipelinedToyEngine, expected_tokens
from support.worker_bench import PEER, SESSION, WorkerBench, prompt_of, request


class Bench(WorkerBench):
    engine: PipelinedToyEngine

    @property
    def busy(self) -> bool:
        return self.worker.ledger.pipeline.busy

    @property
    def held(self) -> int:
        return self.engine.kv.counts().held

    def launched(self) -> list[str]:
        """Whose rows the last step had."""
        return sorted(name for name, _ in self.engine.rows_run[-1])

    def decode(self, *names: str, max_tokens: int = 30, **sampling: Any) -> None:
        """Requests of 10 tokens each, until all have three tokens and a row on its way."""
        for i, name in enumerate(names):
            self.submit(request(name, prompt_of(10, i), max_tokens, **sampling))
        while len(self.outputs) < 3 * len(names):
            self.step()
        assert self.busy
        assert self.launched() == sorted(names)

    def assert_exact(self, *names: str) -> None:
        for i, name in enumerate(names):
            tokens = self.tokens(name)
            assert tokens == expected_tokens(prompt_of(10, i), len(tokens)), name


def bench(num_blocks: int = 64, left_to_host: int = 0, **limits: int) -> Bench:
    engine = PipelinedToyEngine(num_blocks)
    engine.left_to_host = left_to_host
    return Bench(engine, BatchConfig(**{"max_tokens_per_step": 64, **limits}))


def test_a_step_is_launched_before_the_last_one_has_landed() -> None:
    """The point of it all. Only behind the prompt a step is missing: before it lands its samples do not exist."""
    b = bench()
    b.submit(request("a", prompt_of(10), max_tokens=5))
    seen = []
    while b.step():
        seen.append((len(b.engine.rows_run), len(b.outputs), b.busy))
    ahead = [(n + 1, n, True) for n in (1, 2, 3, 4)]
    assert seen == [(1, 0, True), (1, 1, False), *ahead, (5, 5, False)]
    assert b.tokens("a") == expected_tokens(prompt_of(10), 5)
    b.assert_clean()


def test_prompts_join_without_a_pause() -> None:
    """A stream that decodes keeps a row in every step while prompts of several chunks begin, end and join it."""
    b = bench(prefill_chunk_tokens=8)
    b.decode("a", max_tokens=40)
    first = len(b.engine.rows_run)
    for i in range(1, 4):
        b.submit(request(f"p{i}", prompt_of(21, i), max_tokens=6))
        for _ in range(4):
            b.step()
            assert b.busy
    b.run()
    steps = b.engine.rows_run[first : first + 30]
    assert all("a" in dict(rows) for rows in steps)
    assert max(map(len, steps)) > 2, "joined by what it waited for"
    b.assert_exact("a")
    for i in range(1, 4):
        assert b.tokens(f"p{i}") == expected_tokens(prompt_of(21, i), 6)
    b.assert_clean()


def test_end_by_length_is_known_ahead_and_computes_nothing_more() -> None:
    b = bench()
    b.decode("a", "b", max_tokens=5)
    b.run()
    assert sum(tokens for rows in b.engine.rows_run for _, tokens in rows) == 2 * (10 + 4)
    assert [b.finish(name) for name in "ab"] == [FinishReason.LENGTH] * 2
    b.assert_exact("a", "b")
    b.assert_clean()


def test_sequence_that_stops_runs_once_more_and_keeps_its_blocks_until_then() -> None:
    """Guards the overrun: its token is dropped, and its blocks are held until the row has landed."""
    b = bench()
    whole = expected_tokens(prompt_of(10, 0), 30)
    b.submit(request("a", prompt_of(10, 0), 30, stop_token_ids=(whole[4],)))
    b.submit(request("b", prompt_of(10, 1), 30))
    while not any(o.finish for o in b.outputs):
        b.step()
    assert b.tokens("a") == whole[:5]
    assert b.launched() == ["a", "b"], "the row past the end is on its way"
    (parked,) = map(list, b.worker.ledger.pipeline.parked())
    assert len(parked) == 4, "15 tokens and the overrun"
    assert all(b.engine.kv.holders(block) == 1 for block in parked[3:])
    b.step()
    assert b.launched() == ["b"]
    assert b.worker.ledger.pipeline.parked() == []
    assert not b.engine.kv.holders(parked[3])
    b.run()
    assert b.finish("a") is FinishReason.STOP
    b.assert_exact("a", "b")
    b.assert_clean()


def test_blocks_of_a_stopped_sequence_are_not_granted_to_a_peer_too_early() -> None:
    """Its last row would write into KV that has arrived: a wrong token of somebody else, much later."""
    b = bench(num_blocks=5)
    whole = expected_tokens(prompt_of(10), 30)
    b.submit(request("a", prompt_of(10), 30, stop_token_ids=(whole[2],)))
    key, prompt = HandoffKey("d", 0), prompt_of(16, 5)
    b.submit(request("d", prompt, 3), LegKind.DECODE)
    b.worker.handle(Offered(Offer(key, 16, 4), PEER), b.now)
    granted_in = []
    while not granted_in:
        busy = b.worker.ledger.pipeline.parked() != []
        b.step()
        if "grant" in b.agent.names():
            granted_in.append(busy)
        if b.worker.ledger.pipeline.parked():
            assert "grant" not in b.agent.names()
    landing = next(what for name, what in b.agent.calls if name == "grant")
    assert isinstance(landing, Landing)
    for i, block_id in enumerate(landing.block_ids):
        b.engine.slots[block_id] = prompt[4 * i : 4 * i + 4]
    first = expected_tokens(prompt, 3)
    b.worker.handle(Landed(key, encode_first_tokens({0: first[0]})), b.now)
    b.run()
    assert b.tokens("d") == first[1:]
    b.assert_clean()


@pytest.mark.parametrize("request_id", ["a", None])
def test_abort_of_a_running_sequence_drops_its_row(request_id: str | None) -> None:
    b = bench()
    b.decode("a", "b")
    held, outputs = b.held, len(b.outputs)
    b.worker.handle(Abort(SESSION, request_id), b.now)
    assert b.worker.audit().problems == ()
    assert b.held == held, "the rows are on their way"
    assert not b.worker.empty()
    b.step()
    assert b.held < held
    b.run()
    assert [o for o in b.outputs[outputs:] if o.request_id == "a"] == []
    assert b.worker.empty()
    b.assert_clean()


def test_abort_of_one_sample_leaves_the_others() -> None:
    """Guards shared prompt blocks and a partial block that was copied."""
    b = bench()
    b.submit(request("n", prompt_of(10), 20, n=3))
    for _ in range(4):
        b.step()
    b.worker.handle(Abort(SESSION, "n", sample=1), b.now)
    b.run()
    for sample in (0, 2):
        assert b.tokens("n", sample) == expected_tokens(prompt_of(10), 20, sample=sample)
    assert len(b.tokens("n", 1)) < 20
    b.assert_clean()


def test_abort_of_a_prompt_whose_chunk_is_on_its_way() -> None:
    b = bench(prefill_chunk_tokens=8)
    b.submit(request("a", prompt_of(40)))
    b.step()
    b.worker.handle(Abort(SESSION, "a"), b.now)
    assert b.held == 10
    assert b.worker.audit().problems == ()
    b.step()
    assert b.held == 0
    b.assert_clean()


def test_blocks_of_a_cancelled_hand_off_wait_for_the_chunk_that_writes_them() -> None:
    """The network has let go of them; the device has not."""
    b = bench(prefill_chunk_tokens=8)
    b.submit(request("p", prompt_of(40)), LegKind.PREFILL)
    b.step()
    b.step()
    assert b.busy
    ready = [len(ids) for name, ids in b.agent.calls if name == "blocks_ready"]
    assert ready == [2], "of two chunks one has landed"
    b.worker.handle(Abort(SESSION, "p"), b.now)
    assert b.agent.names()[-1] == "cancel"
    b.worker.handle(Released(HandoffKey("p", 0), acked=False), b.now)
    assert (b.busy, b.held) == (True, 10)
    assert b.worker.audit().problems == ()
    b.step()
    assert (b.busy, b.held) == (False, 0)
    b.assert_clean()


def test_hand_off_sends_no_block_that_has_not_landed() -> None:
    b = bench(prefill_chunk_tokens=8)
    b.submit(request("p", prompt_of(18)), LegKind.PREFILL)
    announced = []
    while b.step():
        announced.append([len(ids) for name, ids in b.agent.calls if name == "blocks_ready"])
    assert announced == [[], [2], [2, 2], [2, 2, 1]]
    assert b.tokens("p") == expected_tokens(prompt_of(18), 1)
    b.worker.handle(Released(HandoffKey("p", 0), acked=True), b.now)
    b.assert_clean()


def test_nobody_gives_way_with_a_row_on_its_way() -> None:
    """A pool that runs out: the last step lands first, then the youngest is computed again."""
    b = bench(num_blocks=14)
    for i in range(5):
        b.submit(request(f"r{i}", prompt_of(6, i), max_tokens=24))
        b.step()
    b.run()
    assert b.worker.decode.scheduler.num_preemptions > 0
    for i in range(5):
        assert b.tokens(f"r{i}") == expected_tokens(prompt_of(6, i), 24)
    b.assert_clean()


def test_last_token_at_the_end_of_the_pool_needs_no_block_behind_it() -> None:
    b = bench(num_blocks=4)
    b.submit(request("big", prompt_of(10), max_tokens=500))
    b.run()
    assert b.tokens("big") == expected_tokens(prompt_of(10), 6)
    assert b.finish("big") is FinishReason.LENGTH
    b.assert_clean()


def test_steps_land_one_by_one_while_a_sequence_moves() -> None:
    """Its newest token leaves with it, so that must be known, and nothing may write to its blocks any more."""
    b = bench()
    b.decode("a", "b")
    tokens = len(b.tokens("a"))
    order = Migrate("a", 0, PEER, "a~1", 1, context_tokens=10 + tokens)
    b.worker.handle(MigrationOrdered(SESSION, order), b.now)
    b.step()
    assert not b.busy
    b.worker.handle(Released(HandoffKey("a~1", 1), acked=True), b.now)
    b.step()
    b.worker.handle(Granted(HandoffKey("a~1", 1), 0), b.now)
    paused = len(b.tokens("a"))
    b.step()
    assert (len(b.tokens("a")), b.busy) == (paused, False)
    b.worker.handle(Released(HandoffKey("a~1", 1), acked=True), b.now)
    b.run()
    assert len(b.tokens("a")) == paused
    b.assert_exact("a", "b")
    b.assert_clean()


@pytest.mark.parametrize(
    "sampling", [{"frequency_penalty": 0.5}, {"logit_bias": ((3, 1.0),)}, {"logprobs": 0}], ids=lambda s: next(iter(s))
)
def test_what_needs_the_host_lands_before_the_next_step(sampling: dict[str, Any]) -> None:
    b = bench()
    b.decode("a")
    b.submit(request("b", prompt_of(10, 1), 5, **sampling))
    while "b" not in {o.request_id for o in b.outputs}:
        b.step()
    while b.finish("b") is None:
        b.step()
        assert not b.busy
    b.step()
    assert b.busy, "it is gone"
    b.run()
    b.assert_exact("a", "b")
    b.assert_clean()


def test_min_tokens_needs_the_host_only_until_they_are_there() -> None:
    b = bench()
    b.submit(request("a", prompt_of(10, 0), 8, min_tokens=3, stop_token_ids=(1008,)))
    busy = []
    while b.step():
        busy.append((len(b.outputs), b.busy))
    assert [flying for count, flying in busy if 1 <= count < 3] == [False] * 2
    assert any(flying for count, flying in busy if count >= 3)
    b.assert_exact("a")


@pytest.mark.parametrize("every", [1, 2, 3])
def test_row_that_read_what_nobody_drew_is_computed_again(every: int) -> None:
    """Draws left to the host: the step on top of them is void for that row, and no row is void for what a void one
    left behind."""
    b = bench(left_to_host=every)
    for i in range(3):
        b.submit(request(f"r{i}", prompt_of(10, i), max_tokens=20))
    b.run()
    b.assert_exact("r0", "r1", "r2")
    assert all(len(b.tokens(f"r{i}")) == 20 for i in range(3))
    b.assert_clean()


def test_loop_that_ends_leaves_nothing_on_its_way() -> None:
    """A device that still computes when the pool's memory goes would write into somebody else's."""

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    engine = PipelinedToyEngine(16)
    worker = Worker(engine, RecordingAgent(), BatchConfig())
    loop = StepLoop(worker, Silent())  # type: ignore[arg-type]
    driver = Bench(engine, BatchConfig())
    driver.worker = worker
    driver.submit(request("a", prompt_of(10), 50))
    loop.turn(block=False)
    assert worker.ledger.pipeline.busy
    loop.stop()
    loop.turn(block=False)
    assert not worker.ledger.pipeline.busy
