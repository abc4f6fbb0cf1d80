"""The step loop's body on one engine: exact tokens through batching, chunks, forks, preemption, hand-off and abort."""

from __future__ import annotations

import pytest

from kvbaton.engine.config import BatchConfig
from kvbaton.engine.handoff_payload import decode_first_tokens, encode_first_tokens
from kvbaton.engine.orders import Abort, LegKind
from kvbaton.engine.outgoing import OutgoingState
from kvbaton.engine.request import FinishReason, Request, SamplingParams
from kvbaton.kvtransfer.messages import Cause, Failed, HandoffKey, Landed, Landing, Offer, Offered, Released
from support.toy_engine import ToyEngine, expected_tokens
from support.worker_bench import PEER, SESSION, WorkerBench, prompt_of, request, squeeze

pytestmark = pytest.mark.usefixtures("_each_way")


def toy_bench(num_blocks: int = 64, limits: BatchConfig | None = None) -> ToyBench:
    return ToyBench(ToyEngine(num_blocks), limits or BatchConfig(max_tokens_per_step=64))


class ToyBench(WorkerBench):
    engine: ToyEngine


@pytest.fixture
def bench() -> ToyBench:
    return toy_bench()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 17, 50])
@pytest.mark.parametrize("chunk", [3, 4, 512])
def test_local_request_gets_its_exact_tokens(length: int, chunk: int) -> None:
    """Guards chunk arithmetic at block boundaries."""
    bench = toy_bench(limits=BatchConfig(max_tokens_per_step=64, prefill_chunk_tokens=chunk))
    bench.submit(request("a", prompt_of(length)))
    bench.run()
    assert bench.tokens("a") == expected_tokens(prompt_of(length), 8)
    assert bench.finish("a") is FinishReason.LENGTH
    bench.assert_clean()


def test_many_requests_share_steps_and_stay_exact(bench: ToyBench) -> None:
    """Guards mixing rows up: prefill chunks and decode rows of different requests in one forward pass."""
    for i in range(6):
        bench.submit(request(f"r{i}", prompt_of(5 + 3 * i, i), max_tokens=4 + i))
        bench.step()
    bench.run()
    for i in range(6):
        assert bench.tokens(f"r{i}") == expected_tokens(prompt_of(5 + 3 * i, i), 4 + i)
    assert max(len(rows) for rows in bench.engine.rows_run) > 3
    bench.assert_clean()


def test_token_budget_bounds_every_step() -> None:
    """Guards a step that runs more tokens than it may, which would stall running streams."""
    bench = toy_bench(limits=BatchConfig(max_tokens_per_step=16, prefill_chunk_tokens=6))
    bench.submit(request("first", prompt_of(4), max_tokens=30))
    bench.step()
    bench.submit(request("long", prompt_of(60, 2)))
    bench.run()
    mixed = [rows for rows in bench.engine.rows_run if len(rows) == 2]
    assert mixed, "the long prompt must be chunked beside the running stream"
    assert all(sum(tokens for _, tokens in rows) <= 7 for rows in mixed)


def test_samples_share_the_prompt_and_diverge_by_copy(bench: ToyBench) -> None:
    """Guards copy-on-write: four samples write different tokens behind the same partial block."""
    bench.submit(request("n", prompt_of(10), max_tokens=9, n=4))
    bench.step()
    held = bench.engine.kv.counts().held
    assert held == 3, "four samples hold the prompt's three blocks once"
    bench.run()
    for sample in range(4):
        assert bench.tokens("n", sample) == expected_tokens(prompt_of(10), 9, sample=sample)
    bench.assert_clean()


def test_second_request_reuses_the_cached_prefix(bench: ToyBench) -> None:
    """Guards cached_tokens and the rule that at least one prompt token is computed."""
    bench.submit(request("a", prompt_of(16)))
    bench.run()
    bench.submit(request("b", prompt_of(16)))
    bench.submit(request("c", (*prompt_of(16), 5, 6, 7)))
    bench.run()
    first = {o.request_id: o.cached_tokens for o in bench.outputs if o.index == 0}
    assert first == {"a": 0, "b": 12, "c": 16}
    assert bench.tokens("b") == expected_tokens(prompt_of(16), 8)
    assert bench.tokens("c") == expected_tokens((*prompt_of(16), 5, 6, 7), 8)
    bench.assert_clean()


def test_tiny_pool_preempts_the_youngest_and_stays_exact() -> None:
    """Guards deadlock and lost state when the pool cannot hold every running sequence."""
    bench = toy_bench(num_blocks=14)
    for i in range(5):
        bench.submit(request(f"r{i}", prompt_of(6, i), max_tokens=24))
        bench.step()
    bench.run()
    assert bench.worker.decode.scheduler.num_preemptions > 0
    for i in range(5):
        assert bench.tokens(f"r{i}") == expected_tokens(prompt_of(6, i), 24)
    bench.assert_clean()


def test_preemption_takes_the_youngest_first() -> None:
    """Guards the order: the oldest stream must be the last to give way."""
    bench = toy_bench(num_blocks=6)
    for name in ("old", "young"):
        bench.submit(request(name, prompt_of(8, len(name)), max_tokens=20))
        bench.step()
    bench.run()
    finished = [o.request_id for o in bench.outputs if o.finish]
    assert finished == ["old", "young"]
    bench.assert_clean()


def test_sequence_that_fills_the_whole_pool_ends_with_length() -> None:
    """Guards a request that could be preempted but never computed again."""
    bench = toy_bench(num_blocks=4)
    bench.submit(request("big", prompt_of(10), max_tokens=500))
    bench.run()
    assert bench.tokens("big") == expected_tokens(prompt_of(10), 6)
    assert bench.finish("big") is FinishReason.LENGTH
    bench.assert_clean()


def test_resumed_sample_continues_where_it_was(bench: ToyBench) -> None:
    """Guards numbering and tokens of a resume: emitted tokens count and are not sent again."""
    whole = expected_tokens(prompt_of(9), 12, sample=2)
    req = Request("r", prompt_of(9), SamplingParams(max_tokens=12), (2,), tuple(whole[:5]), epoch=1)
    bench.submit(req)
    bench.run()
    assert bench.tokens("r", 2) == whole[5:]
    assert [o.index for o in bench.outputs] == list(range(5, 12))
    bench.assert_clean()


def test_stop_id_ends_a_sample_but_not_before_min_tokens(bench: ToyBench) -> None:
    whole = expected_tokens(prompt_of(5), 8)
    stop = (whole[1], whole[4])
    bench.submit(request("s", prompt_of(5), stop_token_ids=stop, min_tokens=3))
    bench.run()
    assert bench.tokens("s") == whole[:5]
    assert bench.finish("s") is FinishReason.STOP


def test_prompt_that_cannot_fit_is_refused_by_name(bench: ToyBench) -> None:
    bench.submit(request("big", prompt_of(64 * 4)))
    bench.submit(request("alien", (5, 2000)))
    bench.collect()
    assert [(o.request_id, o.finish) for o in bench.outputs] == [
        ("big", FinishReason.ERROR),
        ("alien", FinishReason.ERROR),
    ]
    assert "255" in str(bench.outputs[0].error)
    assert "vocabulary" in str(bench.outputs[1].error)
    bench.assert_clean()


def test_short_prompt_overtakes_a_long_one() -> None:
    """Guards head-of-line blocking in the prefill queue."""
    bench = toy_bench(limits=BatchConfig(max_tokens_per_step=8, prefill_chunk_tokens=8))
    bench.submit(request("long", prompt_of(100), max_tokens=1))
    bench.step()
    bench.submit(request("short", prompt_of(4, 3), max_tokens=1))
    bench.run()
    assert [o.request_id for o in bench.outputs] == ["short", "long"]
    bench.assert_clean()


class TestPrefillLeg:
    def test_first_token_goes_out_and_blocks_follow_in_order(self) -> None:
        bench = toy_bench(limits=BatchConfig(max_tokens_per_step=8, prefill_chunk_tokens=8))
        bench.submit(request("p", prompt_of(18)), LegKind.PREFILL)
        bench.run()
        assert bench.tokens("p") == expected_tokens(prompt_of(18), 1)
        key = HandoffKey("p", 0)
        assert bench.agent.calls[0] == ("offer", Offer(key, 18, 5))
        ready = [ids for name, ids in bench.agent.calls if name == "blocks_ready"]
        assert [len(ids) for ids in ready] == [2, 2, 1], "whole blocks after each chunk, then the tail"
        assert bench.agent.names()[-1] == "finish"
        assert decode_first_tokens(bench.agent.calls[-1][1]) == {0: bench.tokens("p")[0]}  # type: ignore[arg-type]
        assert bench.engine.kv.counts().held == 5, "held until the ack"
        bench.worker.handle(Released(key, acked=True), bench.now)
        bench.assert_clean()
        assert bench.engine.kv.counts().cached == 4, "full blocks stay as reusable prefix"

    def test_request_that_ends_with_its_first_token_transfers_nothing_more(self, bench: ToyBench) -> None:
        bench.submit(request("p", prompt_of(6), max_tokens=1), LegKind.PREFILL)
        bench.run()
        assert bench.finish("p") is FinishReason.LENGTH
        assert bench.agent.calls[-1] == ("cancel", ("finished with its first token", Cause.FINISHED))
        bench.worker.handle(Released(HandoffKey("p", 0), acked=False), bench.now)
        bench.assert_clean()

    @pytest.mark.parametrize("steps", [0, 1, 2, 5])
    def test_abort_in_every_state_gives_all_back_after_release(self, steps: int) -> None:
        """0 queued, 1 and 2 computing, 5 sent; blocks stay until the transport is done with them."""
        bench = toy_bench(limits=BatchConfig(max_tokens_per_step=8, prefill_chunk_tokens=8))
        bench.submit(request("p", prompt_of(18)), LegKind.PREFILL)
        for _ in range(steps):
            bench.step()
        key = HandoffKey("p", 0)
        state = bench.worker.prefill.outgoing.state(key)
        bench.worker.handle(Abort(SESSION, "p"), bench.now)
        expected = {0: None, 1: OutgoingState.OPEN, 2: OutgoingState.OPEN, 5: OutgoingState.SENT}
        assert state is expected[steps]
        assert bench.engine.kv.counts().held == (5 if steps else 0)
        if steps:
            assert bench.agent.names()[-1] == "cancel"
            bench.worker.handle(Released(key, acked=False), bench.now)
        bench.run()
        bench.assert_clean()

    def test_failure_is_told_to_the_ingress_and_stops_the_computation(self) -> None:
        bench = toy_bench(limits=BatchConfig(max_tokens_per_step=8, prefill_chunk_tokens=8))
        bench.submit(request("p", prompt_of(18)), LegKind.PREFILL)
        bench.step()
        key = HandoffKey("p", 0)
        bench.worker.handle(Failed(key, "peer is gone"), bench.now)
        bench.collect()
        assert [(o.finish, o.error) for o in bench.outputs] == [(FinishReason.ERROR, "peer is gone")]
        bench.settle()
        assert not bench.step()
        assert bench.engine.kv.counts().held == 5
        bench.worker.handle(Released(key, acked=False), bench.now)
        bench.assert_clean()


class TestDecodeLeg:
    def land(self, bench: ToyBench, req: Request, order: str) -> Landing:
        """Bring a request to the granted state, SUBMIT first or OFFER first, and write its KV."""
        key = HandoffKey(req.request_id, req.epoch)
        blocks = -(-len(req.context) // 4)
        offered = Offered(Offer(key, len(req.context), blocks), PEER)
        for what in order:
            if what == "s":
                bench.submit(req, LegKind.DECODE)
            else:
                bench.worker.handle(offered, bench.now)
        bench.step()
        landing = bench.agent.calls[-1][1]
        assert isinstance(landing, Landing)
        for block_id, start in zip(landing.block_ids, range(landing.first_block * 4, len(req.context), 4), strict=True):
            part = req.context[start : start + 4]
            bench.engine.slots[block_id, : len(part)] = part
        return landing

    @pytest.mark.parametrize("order", ["so", "os"])
    def test_landed_request_decodes_from_the_second_token(self, bench: ToyBench, order: str) -> None:
        req = request("d", prompt_of(10))
        whole = expected_tokens(req.prompt, 8)
        landing = self.land(bench, req, order)
        assert (landing.first_block, len(landing.block_ids)) == (0, 3)
        bench.worker.handle(Landed(HandoffKey("d", 0), encode_first_tokens({0: whole[0]})), bench.now)
        assert bench.agent.names()[-1] == "ack"
        bench.run()
        assert bench.tokens("d") == whole[1:]
        assert bench.outputs[0].index == 1
        bench.assert_clean()

    def test_cached_prefix_does_not_travel(self, bench: ToyBench) -> None:
        bench.submit(request("a", prompt_of(16)))
        bench.run()
        landing = self.land(bench, request("d", prompt_of(16)), "so")
        assert (landing.first_block, landing.block_ids) == (4, ()), "all four blocks are here already"

    def test_samples_fork_from_one_landing(self, bench: ToyBench) -> None:
        req = request("n", prompt_of(10), n=3)
        self.land(bench, req, "so")
        first = {s: expected_tokens(req.prompt, 1, sample=s)[0] for s in range(3)}
        bench.worker.handle(Abort(SESSION, "n", sample=1), bench.now)
        bench.worker.handle(Landed(HandoffKey("n", 0), encode_first_tokens(first)), bench.now)
        bench.run()
        for sample in (0, 2):
            assert bench.tokens("n", sample) == expected_tokens(req.prompt, 8, sample=sample)[1:]
        assert not [o for o in bench.outputs if o.sample == 1], "aborted while its KV travelled"
        bench.assert_clean()

    def test_no_memory_is_held_before_the_offer(self, bench: ToyBench) -> None:
        bench.submit(request("d", prompt_of(40)), LegKind.DECODE)
        bench.run()
        assert bench.engine.kv.counts().held == 0
        bench.worker.handle(Abort(SESSION, "d"), bench.now)
        bench.assert_clean()
        assert bench.agent.calls == []

    def test_offer_waits_for_room_and_is_granted_when_there_is_some(self) -> None:
        bench = toy_bench(num_blocks=8)
        bench.submit(request("busy", prompt_of(20), max_tokens=6))
        bench.step()
        req = request("d", prompt_of(12, 2))
        bench.submit(req, LegKind.DECODE)
        bench.worker.handle(Offered(Offer(HandoffKey("d", 0), 12, 3), PEER), bench.now)
        bench.step()
        assert bench.agent.calls == [], "three blocks are free but running sequences keep a reserve"
        bench.run()
        assert bench.agent.names() == ["grant"]

    def test_offer_that_does_not_match_the_submit_is_refused(self, bench: ToyBench) -> None:
        bench.submit(request("d", prompt_of(12)), LegKind.DECODE)
        bench.worker.handle(Offered(Offer(HandoffKey("d", 0), 13, 4), PEER), bench.now)
        assert bench.agent.calls == [("cancel", ("offer of 13 tokens in 4 blocks, expected 12 in 3", Cause.CANCELLED))]

    def test_offer_without_a_submit_expires(self, bench: ToyBench) -> None:
        bench.worker.handle(Offered(Offer(HandoffKey("x", 0), 12, 3), PEER), bench.now)
        bench.now += 11
        bench.step()
        assert bench.agent.names() == ["cancel"]
        bench.worker.handle(Released(HandoffKey("x", 0), acked=False), bench.now)
        bench.assert_clean()

    @pytest.mark.parametrize(
        ("cause", "told"),
        [(Cause.FINISHED, []), (Cause.CANCELLED, [(FinishReason.ERROR, "all is finished")])],
        ids=lambda value: value.name if isinstance(value, Cause) else "",
    )
    def test_only_the_cause_tells_a_finished_request_from_a_broken_one(
        self, bench: ToyBench, cause: Cause, told: list[object]
    ) -> None:
        """Guards control flow that hangs on the words of a reason: prefill has told the ingress the end itself."""
        self.land(bench, request("d", prompt_of(10)), "so")
        bench.worker.handle(Failed(HandoffKey("d", 0), "all is finished", cause), bench.now)
        bench.collect()
        assert [(o.finish, o.error) for o in bench.outputs] == told
        bench.worker.handle(Released(HandoffKey("d", 0), acked=False), bench.now)
        bench.assert_clean()

    @pytest.mark.parametrize("state", ["expected", "waiting", "granted", "running", "preempted"])
    def test_abort_in_every_state(self, state: str) -> None:
        bench = toy_bench(num_blocks=12)
        req = request("d", prompt_of(10), max_tokens=40)
        key = HandoffKey("d", 0)
        if state == "expected":
            bench.submit(req, LegKind.DECODE)
        elif state == "waiting":
            bench.submit(req, LegKind.DECODE)
            bench.worker.handle(Offered(Offer(key, 10, 3), PEER), bench.now)
        else:
            self.land(bench, req, "so")
        if state in ("running", "preempted"):
            bench.worker.handle(Landed(key, encode_first_tokens({0: 3})), bench.now)
            bench.step()
        if state == "preempted":
            squeeze(bench.engine, bench.worker, bench.now)
        bench.worker.handle(Abort(SESSION, "d"), bench.now)
        bench.worker.handle(Released(key, acked=False), bench.now)
        bench.run()
        bench.assert_clean()

    def test_lost_session_ends_all_of_its_requests(self, bench: ToyBench) -> None:
        for i in range(3):
            bench.submit(request(f"r{i}", prompt_of(9, i), max_tokens=100))
        bench.step()
        bench.worker.handle(Abort(SESSION, None), bench.now)
        bench.settle()
        assert not bench.step()
        bench.assert_clean()
