"""The engine thread's loop, turned by hand: what its inbox takes, and how a pass that does not return shows."""

from __future__ import annotations

import pytest

from kvbaton.cluster.host.inbox import InboxLimits
from kvbaton.cluster.host.step_loop import StepLoop
from kvbaton.cluster.host.worker import Worker
from kvbaton.cluster.session.server import SubmitRefused
from kvbaton.engine.batch import Pending, ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.kv.block_owners import BlockAudit
from kvbaton.engine.kv.kv_manager import CacheEvent, CacheSnapshot
from kvbaton.engine.orders import Abort, LegKind, Notice, Submit, Submitted
from kvbaton.engine.request import TokenOutput
from kvbaton.router.engine_info import EngineLoad
from support.recording_agent import RecordingAgent
from support.toy_cluster import Clock
from support.toy_engine import ToyEngine, expected_tokens
from support.worker_bench import SESSION, prompt_of, request

pytestmark = pytest.mark.usefixtures("_each_way")


class Sink:
    """A `StepSink` that keeps the outputs."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []

    def stepped(self, outputs: dict[int, list[TokenOutput]], load: EngineLoad) -> None:
        self.outputs += outputs.get(SESSION, [])

    def notices(self, notices: list[tuple[int, Notice]]) -> None: ...

    def audited(self, audit: BlockAudit) -> None: ...

    def cached(self, events: list[CacheEvent]) -> None: ...

    def snapshot(self, snapshot: CacheSnapshot) -> None: ...

    def crashed(self, error: BaseException) -> None:
        raise error


class LongStep(ToyEngine):
    """During each pass `meanwhile` happens."""

    def __init__(self) -> None:
        super().__init__(num_blocks=40)
        self.meanwhile = lambda: None

    def launch(self, rows: list[ScheduledRow]) -> Pending:
        self.meanwhile()
        return super().launch(rows)


class Stage:
    def __init__(self, limits: InboxLimits | None = None, **batch: int) -> None:
        self.engine = LongStep()
        self.clock = Clock()
        self.sink = Sink()
        worker = Worker(self.engine, RecordingAgent(), BatchConfig(max_tokens_per_step=64, **batch))
        self.loop = StepLoop(worker, self.sink, self.clock, limits)

    def submit(self, name: str, prompt_tokens: int = 4) -> None:
        wanted = request(name, prompt_of(prompt_tokens), max_tokens=3)
        self.loop.inbox.submit(Submitted(SESSION, Submit(wanted, LegKind.LOCAL)))

    def run(self) -> None:
        for _ in range(20):
            self.loop.turn(block=False)

    def tokens(self, name: str) -> list[int | None]:
        return [output.token_id for output in self.sink.outputs if output.request_id == name]


def test_requests_past_the_inbox_are_refused_while_a_step_is_long_and_taken_after_it() -> None:
    """Guards an engine that gathers any number of prompts while it does not look at them."""
    stage = Stage(max_waiting=2, max_running=1)
    refused: list[str] = []

    def flood() -> None:
        stage.engine.meanwhile = lambda: None
        for i in range(5):
            try:
                stage.submit(f"during-{i}")
            except SubmitRefused as refusal:
                refused.append(str(refusal))
        stage.loop.inbox.put(Abort(SESSION, "during-0"))  # an end always enters

    stage.submit("first")
    stage.engine.meanwhile = flood
    stage.loop.turn(block=False)
    assert refused == ["engine inbox is full (3 requests)"] * 2
    assert stage.loop.inbox.requests == 3
    stage.run()
    assert stage.loop.inbox.requests == 0
    stage.submit("after")
    stage.run()
    wanted = expected_tokens(prompt_of(4), 3)
    assert (stage.tokens("first"), stage.tokens("after")) == (wanted, wanted)
    assert stage.tokens("during-0") == [], "it was ended before it was begun"


def test_prompt_tokens_of_unread_requests_are_capped_and_a_long_one_enters_alone() -> None:
    stage = Stage(InboxLimits(max_requests=100, max_tokens=10))
    stage.submit("long", prompt_tokens=30)
    with pytest.raises(SubmitRefused, match=r"30 prompt tokens, 10 allowed"):
        stage.submit("next")
    stage.run()
    stage.submit("a", prompt_tokens=6)
    stage.submit("b", prompt_tokens=4)
    with pytest.raises(SubmitRefused, match="10 prompt tokens"):
        stage.submit("c", prompt_tokens=1)


def test_a_pass_that_does_not_return_shows_and_waiting_does_not() -> None:
    stage = Stage()
    seen: list[float] = []

    def hang() -> None:
        stage.clock.now += 70.0
        seen.append(stage.loop.busy_s())

    stage.submit("a")
    stage.engine.meanwhile = hang
    stage.loop.turn(block=False)
    stage.clock.now += 1000.0
    assert (seen, stage.loop.busy_s()) == ([70.0], 0.0)
