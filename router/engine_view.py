"""What the router believes about one engine: its registry entry, its last numbers, and the router's own work on it.

The own book counts from the moment of placing, the engine's numbers from its next frame, and those include the own work
that has arrived. So the larger of the two is taken: never twice the same work, never less than the own.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvbaton.router.engine_info import EngineInfo, EngineLoad
from kvbaton.router.time_model import TimeModel


@dataclass(slots=True)
class EngineView:
    """One engine as the policy sees it. `load` is None until its first frame."""

    info: EngineInfo
    times: TimeModel
    load: EngineLoad | None = None
    own_prefill_tokens: int = 0  # placed here, first token not seen yet
    own_requests: int = 0  # placed here to decode, not finished
    own_context_tokens: int = 0

    @property
    def queued_prefill_tokens(self) -> int:
        reported = 0 if self.load is None else self.load.queued_prefill_tokens
        return max(self.own_prefill_tokens, reported)

    @property
    def decoding(self) -> int:
        """Requests that decode here or wait to."""
        reported = 0 if self.load is None else self.load.running_requests + self.load.waiting_requests
        return max(self.own_requests, reported)

    @property
    def waiting_requests(self) -> int:
        return 0 if self.load is None else self.load.waiting_requests

    @property
    def available_blocks(self) -> int:
        """Blocks that are free or could be: cached ones are evicted on demand."""
        if self.load is None:
            return self.info.num_blocks
        return self.load.free_blocks + self.load.cached_blocks

    def observe(self, load: EngineLoad) -> None:
        """Take over the numbers of a frame. A step without prompt tokens waiting shows the time of a decode step."""
        self.load = load
        if load.queued_prefill_tokens == 0:
            self.times.observe_step(load.running_requests, load.step_s)
