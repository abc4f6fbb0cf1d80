"""What a step has to say to the ingresses: tokens, ends, how migrations ended; kept by session until it is sent."""

from __future__ import annotations

from kvbaton.engine.batch import SampledToken
from kvbaton.engine.legs import Leg
from kvbaton.engine.orders import Notice
from kvbaton.engine.request import ErrorCause, FinishReason, TokenOutput
from kvbaton.engine.sequence import Sequence


class Outbox:
    """Tokens and notices by session id; the tokens of a session are older than its notices."""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens` bounds prompt and completion of a sample."""
        self._max_tokens = max_tokens
        self._tokens: dict[int, list[TokenOutput]] = {}
        self._notices: list[tuple[int, Notice]] = []

    def publish(self, leg: Leg, seq: Sequence, drawn: SampledToken) -> FinishReason | None:
        """Append a drawn token to its sequence, and queue it; returns why it was the last, if it was."""
        seq.tokens.append(drawn.token_id)
        finish = seq.finish_reason(self._max_tokens)
        self._tokens.setdefault(leg.session_id, []).append(_output(leg, seq, drawn, finish))
        return finish

    def refuse(self, leg: Leg, error: str, cause: ErrorCause | None) -> None:
        """Every sample of a request ends without a token."""
        self._tokens.setdefault(leg.session_id, []).extend(leg.submit.refused(error, cause))

    def notice(self, session_id: int, notice: Notice) -> None:
        self._notices.append((session_id, notice))

    def take_tokens(self) -> dict[int, list[TokenOutput]]:
        tokens, self._tokens = self._tokens, {}
        return tokens

    def take_notices(self) -> list[tuple[int, Notice]]:
        notices, self._notices = self._notices, []
        return notices


def _output(leg: Leg, seq: Sequence, drawn: SampledToken, finish: FinishReason | None) -> TokenOutput:
    request = leg.request
    index = seq.num_outputs - 1
    first = index == len(request.emitted)
    return TokenOutput(
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
