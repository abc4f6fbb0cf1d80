"""What one engine knows of each request it works on: who asked, which leg, and the sequences it became."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbaton.cluster.session_types import Leg, Submit
from kvbaton.engine.request import Request, TokenLogprobs
from kvbaton.engine.sequence import Sequence
from kvbaton.kvtransfer.messages import HandoffKey


@dataclass(slots=True)
class Track:
    """`prompt` is the sequence that computes the prompt, until its first tokens are drawn; `live` are the samples that
    decode here afterwards."""

    session_id: int
    submit: Submit
    prompt: Sequence | None = None
    live: dict[int, Sequence] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)  # samples aborted before they were live here
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.submit.request

    @property
    def leg(self) -> Leg:
        return self.submit.leg

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.request.request_id, self.request.epoch)


class Tracks:
    """Tracks by hand-off key, and by session for the day an ingress is lost."""

    def __init__(self) -> None:
        self._by_key: dict[HandoffKey, Track] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: HandoffKey) -> bool:
        return key in self._by_key

    def add(self, track: Track) -> None:
        self._by_key[track.key] = track

    def get(self, key: HandoffKey) -> Track | None:
        return self._by_key.get(key)

    def of(self, seq: Sequence) -> Track | None:
        return self._by_key.get(HandoffKey(seq.request.request_id, seq.request.epoch))

    def remove(self, track: Track) -> None:
        self._by_key.pop(track.key, None)

    def of_session(self, session_id: int) -> list[Track]:
        return [track for track in self._by_key.values() if track.session_id == session_id]

    def of_request(self, session_id: int, request_id: str) -> list[Track]:
        """All epochs of a request that one session submitted here (normally one)."""
        return [t for t in self.of_session(session_id) if t.request.request_id == request_id]
