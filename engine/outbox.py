"""What a step has to say to the ingresses: tokens, ends, how migrations ended; kept by session until it is sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbaton.engine.batch import SampledToken
from kvbaton.engine.legs import Leg
from kvbaton.engine.orders import Notice
from kvbaton.engine.request import FinishReason, TokenOutput
from kvbaton.engine.sequence import Sequence


@dataclass(slots=True)
class Outbox:
    """`tokens` and `notices` by session id; the tokens of a session are older than its notices."""

    tokens: dict[int, list[TokenOutput]] = field(default_factory=dict)
    notices: list[tuple[int, Notice]] = field(default_factory=list)

    def token(self, leg: Leg, seq: Sequence, drawn: SampledToken, finish: FinishReason | None) -> None:
        """The newest token of `seq`."""
        request = leg.request
        index = seq.num_outputs - 1
        first = index == len(request.emitted)
        output = TokenOutput(
            request.request_id,
            request.epoch,
            seq.samples[0],
            index,
            drawn.token_id,
            drawn.logprobs,
            finish,
            seq.cached_tokens if first else None,
            tuple(leg.prompt_logprobs) if first and leg.prompt_logprobs else None,
        )
        self.tokens.setdefault(leg.session_id, []).append(output)

    def refuse(self, leg: Leg, error: str) -> None:
        """Every sample of a request ends without a token."""
        self.tokens.setdefault(leg.session_id, []).extend(leg.submit.refused(error))

    def notice(self, session_id: int, notice: Notice) -> None:
        self.notices.append((session_id, notice))

    def take_tokens(self) -> dict[int, list[TokenOutput]]:
        tokens, self.tokens = self.tokens, {}
        return tokens

    def take_notices(self) -> list[tuple[int, Notice]]:
        notices, self.notices = self.notices, []
        return notices
