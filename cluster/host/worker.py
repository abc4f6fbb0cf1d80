"""One engine in a role: what happens to requests between two forward passes. Single-threaded, no Ray, no sockets.

A step is schedule, launch, publish (often the step before: `StepPipeline`). Decode rows go first, prefill chunks fill
the rest of the token budget, both in one forward pass. A role only decides what the router sends here: it is no state.

    LOCAL leg     prefill queue -> running here
    PREFILL leg   prefill queue -> first token to the ingress, KV held for the peer -> ack
    DECODE leg    landing -> running here
    MOVE leg      landing of a copy, then of the rest -> running here; at its source it is a `Moves` entry

Prompts are kept by `WorkerPrompts`, what decodes by `WorkerSamples`, what others send here by `Arrivals`.
"""

from __future__ import annotations

from kvbaton.cluster.host.commands import Abort, Item, MoveAway, MoveOrder, StepEngine, Submitted
from kvbaton.cluster.host.load import engine_load
from kvbaton.cluster.host.submit_check import SubmitCheck
from kvbaton.cluster.session.types import Leg, MoveWanted
from kvbaton.decode_worker.arrivals import Arrivals, branch
from kvbaton.decode_worker.incoming import Landings
from kvbaton.decode_worker.samples import WorkerSamples
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.batch import SampledToken, ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.first_tokens import encode_first_tokens
from kvbaton.engine.kv.block_audit import audit_blocks
from kvbaton.engine.kv.block_owners import BlockAudit, BlockOwners, Owner
from kvbaton.engine.kv.kv_manager import KVManager
from kvbaton.engine.legs import Track, Tracks
from kvbaton.engine.outgoing import OutgoingHandoffs, OutgoingState
from kvbaton.engine.request import TokenOutput
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import LandedRow, StepPipeline
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import Failed, Granted, Landed, Offered, Released
from kvbaton.prefill_worker.prompts import WorkerPrompts
from kvbaton.router.engine_info import EngineLoad

FINISHED_ON_PREFILL = "finished with its first token"
DEADLINE_GRACE_S = 1.0  # the ingress is nearer to the client: it is first to say that the time is up


class Worker:
    """Owns every sequence, hand-off and block of one engine. All calls come from the engine thread."""

    def __init__(self, engine: StepEngine, agent: HandoffCommands, limits: BatchConfig) -> None:
        self._engine = engine
        self._agent = agent
        # A sequence that outgrew the whole pool could be preempted but never computed again.
        kv, max_tokens = engine.kv, min(engine.max_model_len, engine.kv.num_blocks * engine.kv.block_size)
        self.max_requests = limits.max_waiting + limits.max_running
        self._check = SubmitCheck(max_tokens, engine.vocab_size, self.max_requests)
        self.tracks = Tracks()
        self.owners = BlockOwners()
        self.pipeline = StepPipeline(kv, engine.pipelined)
        self.outgoing = OutgoingHandoffs(kv, agent, self.owners)
        self.prompts = WorkerPrompts(kv, limits, self.tracks, self.outgoing, self.pipeline)
        self.prefill = self.prompts.scheduler
        self.decode = DecodeScheduler(kv, limits.max_running, max_tokens)
        self.landings = Landings(kv, agent, self.owners)
        self.arrivals = Arrivals(engine, self.tracks, self.landings, self.decode)
        self.samples = WorkerSamples(
            kv, max_tokens, self.tracks, self.prefill, self.decode, self.pipeline, self.outgoing
        )
        self.moves, self.outbox = self.samples.moves, self.samples.outbox

    # ---- what comes in ------------------------------------------------------------------------------------------

    def handle(self, item: Item, now: float) -> None:
        """Apply one command of an ingress or one event of the transfer agent."""
        match item:
            case Submitted():
                self._submit(Track(item.session_id, item.submit), now)
            case Abort():
                self._abort(item)
            case Offered():
                self.landings.offered(item, now)
            case Landed():
                self._landed(item, now)
            case Failed():
                self._handoff_failed(item)
            case Released():
                self._released(item)
            case Granted():
                self.moves.granted(item.key, now)  # for others the agent sends ready blocks by itself
            case MoveOrder():
                self.samples.move(item.session_id, item.move)
            case MoveAway():
                for track in self.tracks.named(item.request_id):
                    self.outbox.notice(track.session_id, MoveWanted(track.request.request_id, item.to))

    def step(self, now: float) -> bool:
        """Schedule, launch, publish into the outbox. False when there was nothing to run."""
        lagging = self.pipeline.may_lag(self.decode, len(self.moves) > 0)
        landed = not lagging and self.settle()
        self._end_all(self.arrivals.overdue(now), "the sequence to take over never came")
        self._end_all(self.tracks.overdue(now), "the request's time is up")
        self.moves.advance(now)
        plan = self.decode.schedule()
        for seq in plan.preempted:
            self.prefill.add(seq)
            self.moves.stop(seq, "preempted")
        # Streams that gave their blocks up get them back before others get any.
        refused = self.arrivals.grant(bool(plan.preempted) or self.prefill.queue.preempted, self.pipeline.joining())
        self._end_all(refused, "no room for a sequence that decodes elsewhere")
        rows = plan.rows + self.prompts.rows(len(plan.rows), now)
        stuck = self.arrivals.circle(now, bool(rows) or self.pipeline.busy or self.owners.count(Owner.LANDING) > 0)
        self._end_all(stuck, "no room: every block here waits for other engines")
        if not rows:
            return self.settle() or landed
        if plan.copies:
            self._engine.copy_blocks(plan.copies)
        self._landed_rows(self.pipeline.launch(self._engine, rows))
        if not lagging:
            self.settle()
        return True

    def settle(self) -> bool:
        """Wait for the step on its way and publish it. False when there is none."""
        busy = self.pipeline.busy
        self._landed_rows(self.pipeline.land())
        return busy

    def _landed_rows(self, rows: list[LandedRow]) -> None:
        for landed in rows:
            row, seq = landed.row, landed.row.seq
            track = self.tracks.of(seq)
            if track is None:
                raise RuntimeError(f"request {seq.request.request_id} ran without being tracked")
            track.prompt_logprobs.extend(landed.prompt_logprobs or ())
            if seq.status is Status.RUNNING:
                self.decode.commit(row)
                self.samples.next_token(track, seq, landed.sampled[0])
            else:
                self._prefilled(track, row, landed.sampled)

    def take_outputs(self) -> dict[int, list[TokenOutput]]:
        """Outputs since the last call, by session; the caller sends them."""
        return self.outbox.take_tokens()

    def empty(self) -> bool:
        """True when no request, hand-off or block is held here. Other threads may ask."""
        return not (len(self.tracks) or len(self.outgoing) or len(self.landings) or self.pipeline.busy)

    def load(self, step_s: float) -> EngineLoad:
        waiting = self.landings.waiting()
        counts, queue = self._engine.kv.counts(), self.prefill.queue
        return engine_load(counts, self.owners, queue, self.decode.running, waiting, self._agent.counts(), step_s)

    def audit(self) -> BlockAudit:
        """Every block by its owner, counted anew from the sequences and hand-offs; costs a walk over the pool."""
        tables = [*self.tracks.block_tables(), *self.pipeline.parked()]
        handoffs = [*self.outgoing.held(), *self.landings.held()]
        return audit_blocks(self._engine.kv, self.owners, tables, handoffs, self.pipeline.written())

    @property
    def kv(self) -> KVManager:
        return self._engine.kv

    # ---- a request begins ---------------------------------------------------------------------------------------

    def _submit(self, track: Track, now: float) -> None:
        refusal = self._check.refusal(track.request, len(self.tracks))
        if track.key in self.tracks:
            return  # a duplicate frame; the first one is being served
        if refusal is not None:
            self._end_request(track, refusal)
            return
        if track.request.timeout_s is not None:
            track.overdue_at_s = now + track.request.timeout_s + DEADLINE_GRACE_S
        self.tracks.add(track)
        if track.leg in (Leg.DECODE, Leg.MOVE):
            self.arrivals.expect(track, now)
        else:
            self.prompts.add(track, now)

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _prefilled(self, track: Track, row: ScheduledRow, sampled: tuple[SampledToken, ...]) -> None:
        progress = self.prefill.commit(row)
        if not progress.done:
            if track.leg is Leg.PREFILL:
                self.outgoing.chunk_done(row.seq, progress.full_blocks)
        elif row.seq is not track.prompt:
            self.samples.resume(track, row.seq, sampled[0])
        elif track.leg is Leg.PREFILL:
            self._hand_off(track, row.seq, sampled)
        else:
            self.samples.fork(track, row.seq, sampled)

    def _hand_off(self, track: Track, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """Publish the first tokens at once; what goes on goes to decode with the tail block."""
        going_on: dict[int, int] = {}
        for sample, drawn in zip(seq.samples, sampled, strict=True):
            if self.samples.publish(track, branch(seq, sample), drawn) is None:
                going_on[sample] = drawn.token_id
        track.prompt = None
        if going_on:
            self.outgoing.complete(seq, encode_first_tokens(going_on))  # the track stays until the ack
        else:
            self.tracks.remove(track)
            self.outgoing.cancel(track.key, FINISHED_ON_PREFILL)

    def _landed(self, event: Landed, now: float) -> None:
        try:
            self.arrivals.landed(event, now)
        except ValueError as error:
            track = self.arrivals.track_of(event.key)
            if track is not None:
                self._end_request(track, f"hand-off refused: {error}")

    # ---- a request ends -----------------------------------------------------------------------------------------

    def _end_request(self, track: Track, error: str | None, reason: str = "aborted") -> None:
        """The one transition to the end from any state: every leg and block goes; `error` is told to the ingress."""
        for seq in list(track.live.values()):
            self.samples.end(track, seq)
        self.arrivals.cancel(track, error or reason)
        self.prompts.drop(track)
        if track.leg is Leg.PREFILL:
            self.outgoing.cancel(track.key, error or reason)
        self.tracks.remove(track)
        if error is not None:
            self.outbox.refuse(track, error)

    def _end_all(self, tracks: list[Track], error: str) -> None:
        for track in tracks:
            self._end_request(track, error)

    def _abort(self, abort: Abort) -> None:
        for track in self.tracks.of_request(abort.session_id, abort.request_id):
            if abort.sample is None:
                self._end_request(track, None)
            else:
                self._abort_sample(track, abort.sample)

    def _abort_sample(self, track: Track, sample: int) -> None:
        if sample in track.live:
            self.samples.end(track, track.live[sample])
            return
        track.dropped.add(sample)
        if track.dropped.issuperset(track.request.sample_indices):
            self._end_request(track, None)

    def _handoff_failed(self, event: Failed) -> None:
        sender = self.outgoing.failed(event.key) is not None
        self.moves.failed(event.key, event.reason)
        receiving = self.arrivals.failed(event.key)
        track = self.tracks.get(event.key) if sender else receiving
        if track is None:
            return
        self._end_request(track, None if event.reason.endswith(FINISHED_ON_PREFILL) else event.reason)

    def _released(self, event: Released) -> None:
        """The network touches the hand-off's blocks no more; at prefill this also ends the request."""
        if self.outgoing.state(event.key) is OutgoingState.CLOSING:
            self.settle()  # a chunk of it may be on its way
        self.landings.released(event.key)
        track = self.tracks.get(event.key)
        if self.outgoing.released(event.key) is not None and track is not None and track.leg is Leg.PREFILL:
            self.tracks.remove(track)
        self.moves.released(event.key, event.acked)
