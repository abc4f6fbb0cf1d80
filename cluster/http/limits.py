"""Caps on calls. Apart from the rest of the endpoint, so that a configuration is read without loading that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from kvbaton.settings import BYTES, Count, Setting, check


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What one call may ask for. `max_prompts` in one call; `max_stop_chars` in each stop string."""

    max_body_bytes: Annotated[int, BYTES, Ge(1024), Setting("http.max_body", "larger bodies are refused with 413")] = (
        16 << 20
    )
    max_prompts: Count = 2048
    max_stop_strings: Count = 4
    max_stop_chars: Count = 4096

    def __post_init__(self) -> None:
        check(self)
