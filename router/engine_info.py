"""What the router knows of an engine: who it is (registry) and how busy it is (numbers in every step frame)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated

import msgspec

from kvbaton.engine.request import Natural


class Role(enum.StrEnum):
    """The mode an engine is in. PREFILL and DECODE engines can still do the other's work when told to (LOCAL leg)."""

    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"


class EngineState(enum.StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SWITCHING = "switching"
    UNHEALTHY = "unhealthy"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine incarnation as the registry lists it; `generation` grows each time the id is started anew. Of a prompt
    of more than `prefill_chunk_tokens`, no more than so many are computed in one step. More than `max_requests` at
    a time, whatever it does for each, are refused."""

    engine_id: str
    generation: int
    role: Role
    state: EngineState
    host: str
    session_port: int
    kv_port: int
    model_id: str
    max_model_len: int
    block_size: int
    num_blocks: int
    prefill_chunk_tokens: int
    max_requests: int
    reason: str = ""


class EngineLoad(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An engine's own numbers at the end of a step. Token counts, block counts and seconds.

    `held_blocks` is the sum of those of sequences, of hand-offs that a peer reads, of KV that lands, and of those in
    quarantine.
    """

    waiting_requests: Natural = 0
    running_requests: Natural = 0
    queued_prefill_tokens: Natural = 0
    running_context_tokens: Natural = 0
    free_blocks: Natural = 0
    held_blocks: Natural = 0
    cached_blocks: Natural = 0
    step_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    sequence_blocks: Natural = 0
    hold_blocks: Natural = 0
    landing_blocks: Natural = 0
    quarantine_blocks: Natural = 0
    handoffs_acked: Natural = 0  # since the engine's start, as are the two below
    handoffs_failed: Natural = 0
    checksum_failures: Natural = 0
