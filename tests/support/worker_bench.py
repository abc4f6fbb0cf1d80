"""Drives one `Worker` by hand: submit, step, collect, and a check that nothing stays held."""

from __future__ import annotations

from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.orders import LegKind, Submit, Submitted
from kvbaton.engine.request import FinishReason, Request, SamplingParams, TokenOutput
from kvbaton.engine.step_pipeline import StepEngine
from kvbaton.kvtransfer.messages import PeerAddress
from support.recording_agent import RecordingAgent

SESSION = 7
PEER = PeerAddress("d0", 1, "127.0.0.1", 1)


def prompt_of(length: int, start: int = 1) -> tuple[int, ...]:
    return tuple((start * 31 + i * 7) % 997 for i in range(length))


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 8, **kwargs: object) -> Request:
    n = kwargs.pop("n", 1)
    emitted = kwargs.pop("emitted", ())
    sampling = SamplingParams(max_tokens=max_tokens, n=n, **kwargs)  # type: ignore[arg-type]
    return Request(name, prompt, sampling, sample_indices=tuple(range(n)), emitted=emitted)  # type: ignore[call-overload]


def squeeze(engine: StepEngine, worker: Worker, now: float) -> None:
    """Somebody takes every free block for a while, until a running sequence has to give its own up."""
    worker.settle()
    taken = engine.kv.allocate(engine.kv.available)
    while not worker.prefill.owes_blocks:
        worker.step(now)
    engine.kv.release(taken)


class WorkerBench:
    """One worker, driven by hand, collecting what it publishes."""

    def __init__(self, engine: StepEngine, limits: BatchConfig) -> None:
        self.engine = engine
        self.agent = RecordingAgent()
        self.worker = Worker(engine, self.agent, limits)
        self.outputs: list[TokenOutput] = []
        self.now = 0.0

    def submit(self, req: Request, leg: LegKind = LegKind.LOCAL) -> None:
        self.worker.handle(Submitted(SESSION, Submit(req, leg, None if leg is LegKind.LOCAL else PEER)), self.now)

    def step(self) -> bool:
        self.now += 0.01
        ran = self.worker.step(self.now)
        self.collect()
        assert self.worker.audit().problems == ()
        return ran

    def settle(self) -> None:
        """What is on its way lands."""
        self.worker.settle()
        self.collect()

    def collect(self) -> None:
        for outputs in self.worker.take_outputs().values():
            self.outputs.extend(outputs)

    def run(self, limit: int = 2000) -> None:
        while self.step():
            limit -= 1
            assert limit > 0, "the worker never becomes idle"

    def tokens(self, name: str, sample: int = 0) -> list[int | None]:
        mine = [o for o in self.outputs if o.request_id == name and o.sample == sample]
        assert [o.index for o in mine] == list(range(mine[0].index, mine[0].index + len(mine)))
        return [o.token_id for o in mine]

    def finish(self, name: str, sample: int = 0) -> FinishReason | None:
        return [o for o in self.outputs if o.request_id == name and o.sample == sample][-1].finish

    def assert_clean(self) -> None:
        """Nothing is held once every request has ended."""
        audit = self.worker.audit()
        assert audit.problems == ()
        assert audit.held == 0
        assert self.worker.num_requests == 0
        assert self.worker.handing_off == 0
        assert self.worker.decode.arriving == 0
