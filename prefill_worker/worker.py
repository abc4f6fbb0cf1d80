"""Everything of a prefill leg: prompts that one engine computes, for samples that go on here or at another engine.

    submit ──> queued ──blocks, and room among those that wait for peers──> computed chunk by chunk
                                                        │
             LOCAL leg, or a preempted sample again ────┤──> `Prefilled`: it goes on in the decode worker of this engine
             PREFILL leg: offered with its first chunk ─┘──> first tokens to the ingress, KV to the peer ──> ack

`end` takes a leg out of any of these states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvbaton.engine.batch import SampledToken, ScheduledRow
from kvbaton.engine.config import BatchConfig
from kvbaton.engine.handoff_payload import encode_first_tokens
from kvbaton.engine.kv.block_owners import Holding
from kvbaton.engine.ledger import Ledger
from kvbaton.engine.legs import Ending, Leg
from kvbaton.engine.orders import LegKind
from kvbaton.engine.outgoing import OutgoingHandoffs
from kvbaton.engine.sequence import Sequence, Status
from kvbaton.engine.step_pipeline import LandedRow
from kvbaton.kvtransfer.messages import Cause, Event, Failed, HandoffCommands, Released
from kvbaton.prefill_worker.queue import HoldLimit
from kvbaton.prefill_worker.scheduler import PrefillScheduler


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A sequence that is computed and decodes at this engine, with a token for each of its samples."""

    leg: Leg
    seq: Sequence
    sampled: tuple[SampledToken, ...]


class PrefillWorker:
    """Owns every prompt of one engine until its first tokens are drawn, and its hand-off until the peer has it."""

    def __init__(self, ledger: Ledger, agent: HandoffCommands, limits: BatchConfig) -> None:
        self._ledger = ledger
        self._limits = limits
        self.outgoing = OutgoingHandoffs(ledger.kv, agent, ledger.owners)
        self._holds = HoldLimit(ledger.kv.num_blocks, limits)
        self.scheduler = PrefillScheduler(ledger.kv, limits, self._holds)

    @property
    def waiting(self) -> int:
        """Sequences with tokens left to compute."""
        return len(self.scheduler.queue)

    @property
    def waiting_tokens(self) -> int:
        """What they have left to compute."""
        return self.scheduler.queue.uncomputed_tokens()

    @property
    def owes_blocks(self) -> bool:
        """A stream that had begun gave its blocks up and waits for new ones: they go to it first."""
        return self.scheduler.queue.preempted

    @property
    def handing_off(self) -> int:
        """Hand-offs of prompts that are open."""
        return len(self.outgoing)

    def held(self) -> Iterator[Holding]:
        """The blocks of prompts and of their hand-offs."""
        yield from (Holding(leg.prompt.block_table) for leg in self._ledger.legs if leg.prompt is not None)
        yield from self.outgoing.held()

    def submit(self, leg: Leg, now: float) -> None:
        """Queue a LOCAL or PREFILL leg."""
        leg.prompt = Sequence(leg.request, now)
        self.scheduler.add(leg.prompt, for_peer=leg.kind is LegKind.PREFILL)

    def recompute(self, preempted: Iterable[Sequence]) -> None:
        """Queue running samples that gave their blocks up."""
        for seq in preempted:
            self.scheduler.add(seq)

    def withdraw(self, leg: Leg, sample: int) -> None:
        """A sample ends: where it waits here to be computed again, it does no more. Its blocks stay with it."""
        seq = leg.live.get(sample)
        if seq is not None and seq in self.scheduler.queue:
            self.scheduler.remove(seq)

    def event(self, event: Event) -> list[Ending]:
        """Take an event about a hand-off of a prompt; others are ignored."""
        match event:
            case Failed() if self.outgoing.failed(event.key):
                leg = self._ledger.legs.get(event.key)
                return [] if leg is None else [Ending(leg, event.reason)]
            case Released() if self.outgoing.released(event.key):
                leg = self._ledger.legs.get(event.key)
                if leg is not None and leg.kind is LegKind.PREFILL:
                    self._ledger.legs.remove(leg)  # the peer has it
        return []

    def schedule(self, decode_rows: int, now: float) -> list[ScheduledRow]:
        """Chunks for what `decode_rows` leave of a step's token budget."""
        budget = self._limits.max_tokens_per_step - decode_rows
        if decode_rows:
            budget = min(budget, self._limits.chunk_tokens)  # a running stream waits for one chunk at most
        if not self.waiting:
            return []
        self._holds.begin_step(len(self.outgoing), self.outgoing.num_blocks())
        plan = self.scheduler.schedule(budget, now)
        for seq in plan.started:
            self._offer(self._ledger.legs.of(seq), seq)
        return plan.rows

    def landed(self, landed: LandedRow) -> Prefilled | None:
        """Account for a row that ran; what goes on here, if its sequence is computed and does."""
        row, seq = landed.row, landed.row.seq
        leg = self._ledger.legs.of(seq)
        leg.prompt_logprobs.extend(landed.prompt_logprobs or ())
        progress = self.scheduler.commit(row)
        if progress.done:
            return self._computed(leg, seq, landed.sampled)
        if leg.kind is LegKind.PREFILL:
            self.outgoing.announce(leg.key, progress.full_blocks)
        return None

    def end(self, leg: Leg, reason: str) -> None:
        """Drop what waits or is being computed here, the prompt or samples that gave way, and the prompt's hand-off."""
        for sample in leg.live:
            self.withdraw(leg, sample)
        seq, leg.prompt = leg.prompt, None
        if seq is not None:
            self.scheduler.remove(seq)
            seq.to(Status.FINISHED)
            self._ledger.pipeline.free(seq)
        if leg.kind is LegKind.PREFILL:
            self.outgoing.cancel(leg.key, reason)

    def _offer(self, leg: Leg, seq: Sequence) -> None:
        """The first chunk is about to run."""
        if leg.kind is LegKind.PREFILL and leg.submit.peer is not None:
            self.outgoing.start_prompt(leg.key, leg.submit.peer, seq.block_table, len(seq.tokens))
            cached = seq.num_computed // self._ledger.kv.block_size
            self.outgoing.announce(leg.key, cached)  # what the cache had can travel at once

    def _computed(self, leg: Leg, seq: Sequence, sampled: tuple[SampledToken, ...]) -> Prefilled | None:
        if seq is leg.prompt:
            leg.prompt = None
            if leg.kind is LegKind.PREFILL:
                self._hand_off(leg, seq, sampled)
                return None
        return Prefilled(leg, seq, sampled)

    def _hand_off(self, leg: Leg, seq: Sequence, sampled: tuple[SampledToken, ...]) -> None:
        """Publish the first tokens at once; what goes on goes to the peer with the tail block."""
        going_on: dict[int, int] = {}
        for sample, drawn in zip(seq.samples, sampled, strict=True):
            if self._ledger.outbox.publish(leg, seq.branch(sample), drawn) is None:
                going_on[sample] = drawn.token_id
        if going_on:
            self.outgoing.complete(leg.key, encode_first_tokens(going_on))  # the leg stays until the ack
        else:
            self._ledger.legs.remove(leg)
            self.outgoing.cancel(leg.key, "finished with its first token", Cause.FINISHED)
        self._ledger.pipeline.free(seq)
