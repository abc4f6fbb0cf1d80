"""One engine in a role: what happens to requests between two forward passes. Single-threaded, no Ray, no sockets.

A step is schedule, run, publish. Decode rows go first, prefill chunks fill the rest of the token budget, and both run
in one forward pass; the role only decides what the router sends here, so switching it changes no state in this class.

    LOCAL leg     prefill queue -> running here
    PREFILL leg   prefill queue -> first token to the ingress, KV held for the peer -> ack
    DECODE leg    landing -> running here
"""

from __future__ import annotations

import time

from kvbaton.cluster.session_types import Leg, refused_outputs
from kvbaton.cluster.tracks import Track, Tracks
from kvbaton.cluster.worker_types import Abort, Item, StepEngine, Submitted
from kvbaton.decode_worker.landings import Landings
from kvbaton.decode_worker.scheduler import DecodeScheduler
from kvbaton.engine.batch import SampledToken, ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.first_tokens import decode_first_tokens, encode_first_tokens
from kvbaton.engine.kv_manager import CacheEvent, CacheSnapshot
from kvbaton.engine.request import FinishReason, Request, TokenOutput
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.stopping import finish_reason
from kvbaton.kvtransfer.commands import HandoffCommands
from kvbaton.kvtransfer.messages import Failed, Granted, Landed, Offered, Released
from kvbaton.prefill_worker.outgoing import OutgoingHandoffs
from kvbaton.prefill_worker.scheduler import PrefillScheduler
from kvbaton.router.engine_info import EngineLoad

FINISHED_ON_PREFILL = "finished with its first token"


class Worker:
    """Owns every sequence, hand-off and block of one engine. All calls come from the engine thread."""

    def __init__(self, engine: StepEngine, agent: HandoffCommands, limits: BatchConfig) -> None:
        self._engine = engine
        self._limits = limits
        # A sequence that outgrew the whole pool could be preempted but never computed again.
        self._max_tokens = min(engine.max_model_len, engine.kv.num_blocks * engine.kv.block_size)
        self.tracks = Tracks()
        self.prefill = PrefillScheduler(engine.kv, limits, self._prompt_starts)
        self.decode = DecodeScheduler(engine.kv, limits.max_running)
        self.outgoing = OutgoingHandoffs(engine.kv, agent)
        self.landings = Landings(engine.kv, agent)
        self.model_s = 0.0  # wall time inside forward passes
        self.model_cpu_s = 0.0  # and the CPU time of this thread in them
        self._outputs: dict[int, list[TokenOutput]] = {}

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
                self._landed(item)
            case Failed():
                self._handoff_failed(item)
            case Released():
                self._released(item)
            case Granted():
                pass  # the agent sends ready blocks by itself

    def step(self, now: float) -> bool:
        """Schedule, run, publish into `take_outputs`. False when there was nothing to run."""
        self.landings.expire(now)
        plan = self.decode.schedule()
        for seq in plan.preempted:
            self.prefill.add(seq)
        if not plan.preempted:
            self.landings.grant_waiting(reserve_blocks=len(self.decode.running))
        rows = plan.rows + self._prefill_rows(len(plan.rows), now)
        if not rows:
            return False
        if plan.copies:
            self._engine.copy_blocks(plan.copies)
        started, cpu_started = time.perf_counter(), time.thread_time()
        result = self._engine.run(rows)
        self.model_s += time.perf_counter() - started
        self.model_cpu_s += time.thread_time() - cpu_started
        for row, sampled, prompt_logprobs in zip(rows, result.sampled, result.prompt_logprobs, strict=True):
            track = self.tracks.of(row.seq)
            if track is None:
                raise RuntimeError(f"request {row.seq.request.request_id} ran without being tracked")
            track.prompt_logprobs.extend(prompt_logprobs or ())
            if row.seq.status is Status.RUNNING:
                self.decode.commit(row)
                self._next_token(track, row.seq, sampled[0])
            else:
                self._prefilled(track, row, sampled)
        return True

    def take_outputs(self) -> dict[int, list[TokenOutput]]:
        """Outputs since the last call, by session; the caller sends them."""
        outputs, self._outputs = self._outputs, {}
        return outputs

    def idle(self) -> bool:
        """True when no step can do anything before the next `handle`."""
        return not self.decode.running and not len(self.prefill.queue) and not self.landings.waiting()

    def load(self, step_s: float) -> EngineLoad:
        counts = self._engine.kv.counts()
        return EngineLoad(
            waiting_requests=len(self.prefill.queue) + self.landings.waiting(),
            running_requests=len(self.decode.running),
            queued_prefill_tokens=self.prefill.queue.uncomputed_tokens(),
            running_context_tokens=sum(len(seq.tokens) for seq in self.decode.running),
            free_blocks=counts.free,
            held_blocks=counts.held,
            cached_blocks=counts.cached,
            step_s=step_s,
        )

    def drain_cache_events(self) -> list[CacheEvent]:
        return self._engine.kv.drain_events()

    def cache_snapshot(self) -> CacheSnapshot:
        return self._engine.kv.snapshot()

    # ---- a request begins ---------------------------------------------------------------------------------------

    def _submit(self, track: Track, now: float) -> None:
        refusal = self._refusal(track.request)
        if track.key in self.tracks:
            return  # a duplicate frame; the first one is being served
        if refusal is not None:
            self._end_request(track, refusal)
            return
        self.tracks.add(track)
        if track.leg is Leg.DECODE:
            self.landings.expect(track.request, now)
        else:
            track.prompt = Sequence(track.request, now)
            self.prefill.add(track.prompt)

    def _refusal(self, request: Request) -> str | None:
        tokens = len(request.context)
        if not 0 < tokens < self._max_tokens:
            return f"prompt of {tokens} tokens; this engine takes 1 to {self._max_tokens - 1}"
        if not 0 <= min(request.context) <= max(request.context) < self._engine.vocab_size:
            return f"token id out of vocabulary (0 to {self._engine.vocab_size - 1})"
        if len(self.tracks) >= self._limits.max_waiting + self._limits.max_running:
            return f"engine queue is full ({len(self.tracks)} requests)"
        return None

    def _prefill_rows(self, decode_rows: int, now: float) -> list[ScheduledRow]:
        budget = self._limits.max_tokens_per_step - decode_rows
        if decode_rows:
            budget = min(budget, self._limits.prefill_chunk_tokens)  # a running stream waits for one chunk at most
        return self.prefill.schedule(budget, now) if len(self.prefill.queue) else []

    def _prompt_starts(self, seq: Sequence) -> None:
        track = self.tracks.of(seq)
        if track is not None and track.leg is Leg.PREFILL and track.submit.peer is not None:
            self.outgoing.start(seq, track.submit.peer)

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _prefilled(self, track: Track, row: ScheduledRow, sampled: tuple[SampledToken, ...]) -> None:
        progress = self.prefill.commit(row)
        if not progress.done:
            if track.leg is Leg.PREFILL:
                self.outgoing.chunk_done(row.seq, progress.full_blocks)
        elif row.seq is not track.prompt:  # recomputed after a preemption: one sample, goes on where it was
            self.decode.add(row.seq)
            self._next_token(track, row.seq, sampled[0])
        elif track.leg is Leg.PREFILL:
            self._hand_off(track, row.seq, sampled)
        else:
            self._go_on_here(track, row.seq, sampled)

    def _hand_off(self, track: Track, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """Publish the first tokens at once; what goes on goes to decode with the tail block."""
        going_on: dict[int, int] = {}
        for sample, drawn in zip(seq.samples, sampled, strict=True):
            branch = _branch(seq, sample)
            if self._publish(track, branch, drawn) is None:
                going_on[sample] = drawn.token_id
        track.prompt = None
        if going_on:
            self.outgoing.complete(seq, encode_first_tokens(going_on))  # the track stays until the ack
        else:
            self.tracks.remove(track)
            self.outgoing.cancel(track.key, FINISHED_ON_PREFILL)

    def _go_on_here(self, track: Track, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """Fork the prompt into its samples, which share its blocks until they write."""
        track.prompt = None
        for sample in seq.samples:
            branch = _branch(seq, sample)
            self._engine.kv.fork(branch.block_table)
            track.live[sample] = branch
            self.decode.add(branch)
        for branch, drawn in zip(list(track.live.values()), sampled, strict=True):
            self._next_token(track, branch, drawn)
        self._engine.kv.release(seq.block_table)
        seq.block_table = []

    def _landed(self, event: Landed) -> None:
        """The prompt's KV is here: its samples join the running batch with the tokens that prefill drew."""
        track = self.tracks.get(event.key)
        seq = self.landings.landed(event.key)
        if track is None or seq is None:
            return
        for sample, token_id in decode_first_tokens(event.payload).items():
            if sample in track.dropped:
                continue  # aborted alone while the KV travelled
            branch = _branch(seq, sample)
            branch.tokens.append(token_id)
            self._engine.kv.fork(branch.block_table)
            track.live[sample] = branch
            self.decode.add(branch)
        self._engine.kv.release(seq.block_table)
        seq.block_table = []
        if not track.live:
            self.tracks.remove(track)

    def _next_token(self, track: Track, seq: Sequence, drawn: SampledToken) -> None:
        if self._publish(track, seq, drawn) is not None:
            self._end_sample(track, seq)

    def _publish(self, track: Track, seq: Sequence, drawn: SampledToken) -> FinishReason | None:
        """Append a drawn token to its sequence and queue it for the ingress."""
        request = track.request
        index = seq.num_outputs
        first = index == len(request.emitted)
        seq.tokens.append(drawn.token_id)
        finish = finish_reason(seq, self._max_tokens)
        output = TokenOutput(
            request.request_id,
            request.epoch,
            seq.samples[0],
            index,
            drawn.token_id,
            drawn.logprobs,
            finish,
            seq.cached_tokens if first else None,
            tuple(track.prompt_logprobs) if first and track.prompt_logprobs else None,
        )
        self._outputs.setdefault(track.session_id, []).append(output)
        return finish

    # ---- a request ends -----------------------------------------------------------------------------------------

    def _end_sample(self, track: Track, seq: Sequence) -> None:
        """A running or preempted sample ends: its blocks go back, and the track with the last one."""
        if seq.status is Status.RUNNING:
            self.decode.remove(seq)
        elif seq in self.prefill.queue:
            self.prefill.remove(seq)
        seq.to(Status.FINISHED)
        self._engine.kv.release(seq.block_table)
        seq.block_table = []
        del track.live[seq.samples[0]]
        if not track.live and track.prompt is None:
            self.tracks.remove(track)

    def _end_request(self, track: Track, error: str | None, reason: str = "aborted") -> None:
        """The one transition to the end from any state: every leg and block goes; `error` is told to the ingress."""
        for seq in list(track.live.values()):
            self._end_sample(track, seq)
        if track.leg is Leg.DECODE:
            self.landings.cancel(track.key, error or reason)
        if track.prompt is not None:
            self._drop_prompt(track, track.prompt)
        if track.leg is Leg.PREFILL:
            self.outgoing.cancel(track.key, error or reason)
        self.tracks.remove(track)
        if error is not None:
            self._report(track, error)

    def _drop_prompt(self, track: Track, seq: Sequence) -> None:
        """A prompt that waits or is being computed; blocks that a hand-off may be reading stay with the hand-off."""
        self.prefill.remove(seq)
        seq.to(Status.FINISHED)
        track.prompt = None
        if track.key not in self.outgoing:
            self._engine.kv.release(seq.block_table)
            seq.block_table = []

    def _report(self, track: Track, error: str) -> None:
        outputs = self._outputs.setdefault(track.session_id, [])
        outputs.extend(refused_outputs(track.submit, error))

    def _abort(self, abort: Abort) -> None:
        if abort.request_id is None:
            tracks = self.tracks.of_session(abort.session_id)
        else:
            tracks = self.tracks.of_request(abort.session_id, abort.request_id)
        for track in tracks:
            if abort.sample is None:
                self._end_request(track, None)
            else:
                self._abort_sample(track, abort.sample)

    def _abort_sample(self, track: Track, sample: int) -> None:
        if sample in track.live:
            self._end_sample(track, track.live[sample])
            return
        track.dropped.add(sample)
        if track.dropped.issuperset(track.request.sample_indices):
            self._end_request(track, None)

    def _handoff_failed(self, event: Failed) -> None:
        sender = self.outgoing.failed(event.key) is not None
        receiver = self.landings.failed(event.key)
        track = self.tracks.get(event.key)
        if track is None or not (sender or receiver):
            return
        finished = event.reason.endswith(FINISHED_ON_PREFILL)
        self._end_request(track, None if finished else event.reason)

    def _released(self, event: Released) -> None:
        """Nothing touches the hand-off's blocks any more; at prefill this also ends the request."""
        self.landings.released(event.key)
        track = self.tracks.get(event.key)
        if self.outgoing.released(event.key) is not None and track is not None and track.leg is Leg.PREFILL:
            self.tracks.remove(track)


def _branch(seq: Sequence, sample: int) -> Sequence:
    """One sample of a computed prompt, sharing its block table's blocks (the caller forks their counts)."""
    branch = Sequence(seq.request, seq.arrival_s, (sample,))
    branch.block_table = list(seq.block_table)
    branch.num_computed = seq.num_computed
    branch.cached_tokens = seq.cached_tokens
    return branch
