"""What the router knows of an engine: who it is (registry) and how busy it is (numbers in every step frame)."""

from __future__ import annotations

import enum
from dataclasses import dataclass


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
    of more than `prefill_chunk_tokens`, no more than so many are computed in one step."""

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
    reason: str = ""
    prefill_chunk_tokens: int = 512


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """An engine's own numbers at the end of a step. Token counts, block counts and seconds.

    `held_blocks` is the sum of those of sequences, of hand-offs that a peer reads, of KV that lands, and of those in
    quarantine.
    """

    waiting_requests: int = 0
    running_requests: int = 0
    queued_prefill_tokens: int = 0
    running_context_tokens: int = 0
    free_blocks: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
    step_s: float = 0.0
    sequence_blocks: int = 0
    hold_blocks: int = 0
    landing_blocks: int = 0
    quarantine_blocks: int = 0
    handoffs_acked: int = 0  # since the engine's start, as are the two below
    handoffs_failed: int = 0
    checksum_failures: int = 0
