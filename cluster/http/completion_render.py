"""Plain completions as bytes: the chunks of a stream, or one body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import orjson

from kvbaton.cluster.http.delta import Delta, Usage
from kvbaton.cluster.http.envelope import DONE, Envelope, Extras, finish_json, usage_json
from kvbaton.cluster.http.generation import PromptRun
from kvbaton.cluster.http.logprobs import LegacyLogprobs, TokenTexts
from kvbaton.engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """What both forms are made from. Choice `i` is a sample of prompt `i // samples`; `echo` has each prompt's text,
    or is empty."""

    envelope: Envelope
    extras: Extras
    runs: Sequence[PromptRun]
    samples: int
    texts: TokenTexts
    echo: tuple[str, ...] = ()

    @property
    def choices(self) -> int:
        return len(self.runs) * self.samples

    def run(self, choice: int) -> PromptRun:
        return self.runs[choice // self.samples]

    def echo_text(self, choice: int) -> str:
        return self.echo[choice // self.samples]

    def add_prompt(self, legacy: LegacyLogprobs, choice: int) -> None:
        """The prompt's tokens, echoed with the log-probabilities that came with the first token."""
        run = self.run(choice)
        known = run.prompt_logprobs or (None,) * len(run.prompt.token_ids)
        for token_id, logprobs in zip(run.prompt.token_ids, known, strict=True):
            legacy.add(self.texts, token_id, logprobs)

    def add_token(self, legacy: LegacyLogprobs, delta: Delta) -> None:
        if delta.token_id is not None and delta.logprobs is not None:
            legacy.add(self.texts, delta.token_id, delta.logprobs)


class CompletionStream:
    """Chunks. The echoed prompt of a choice is its first chunk."""

    def __init__(self, shape: CompletionShape, count: Callable[[], Usage]) -> None:
        self._shape = shape
        self._count = count
        extras = shape.extras
        self._plain = not (extras.logprobs or extras.token_ids or extras.running_usage)
        self._head = b"data: " + shape.envelope.head("text_completion")
        self._starts = [self._head + b'[{"index":%d,"text":' % index for index in range(shape.choices)]
        self._text_end = b',"logprobs":null,"finish_reason":null}]' + self._tail()
        self._legacy = [LegacyLogprobs() for _ in range(shape.choices)] if extras.logprobs else []
        self._unopened = set(range(shape.choices)) if shape.echo or extras.token_ids else set[int]()

    def render(self, deltas: Sequence[Delta]) -> bytes:
        out = []
        for delta in deltas:
            if delta.choice in self._unopened:
                out.append(self._opening(delta.choice))
            if delta.finish is not None or not self._plain:
                out.append(self._chunk(delta))
            elif delta.text:
                out.append(self._starts[delta.choice] + orjson.dumps(delta.text) + self._text_end)
        return b"".join(out)

    def close(self, usage: Usage) -> bytes:
        if not self._shape.extras.usage:
            return DONE
        return self._head + b'[],"usage":' + usage_json(usage) + b"}\n\n" + DONE

    def _tail(self) -> bytes:
        if self._shape.extras.running_usage:
            return b',"usage":' + usage_json(self._count()) + b"}\n\n"
        return b',"usage":null}\n\n' if self._shape.extras.usage else b"}\n\n"

    def _opening(self, choice: int) -> bytes:
        self._unopened.discard(choice)
        ids = b""
        if self._shape.extras.token_ids:
            ids = b',"prompt_token_ids":' + orjson.dumps(self._shape.run(choice).prompt.token_ids) + b',"token_ids":[]'
        if self._shape.echo and self._legacy:
            self._shape.add_prompt(self._legacy[choice], choice)
        text = self._shape.echo_text(choice) if self._shape.echo else ""
        return self._assemble(choice, text, None, ids)

    def _chunk(self, delta: Delta) -> bytes:
        """Nothing where there is nothing to say: no text, no end, and nobody asked for more."""
        extras = self._shape.extras
        if not (delta.text or delta.finish or extras.logprobs or extras.token_ids):
            return b""
        if self._legacy:
            self._shape.add_token(self._legacy[delta.choice], delta)
        ids = b""
        if extras.token_ids:
            ids = b',"token_ids":' + orjson.dumps([] if delta.token_id is None else [delta.token_id])
        return self._assemble(delta.choice, delta.text, delta.finish, ids)

    def _assemble(self, choice: int, text: str, finish: FinishReason | None, ids: bytes) -> bytes:
        parts = (
            self._starts[choice],
            orjson.dumps(text),
            b',"logprobs":',
            self._legacy[choice].take_json() if self._legacy else b"null",
            b',"finish_reason":',
            finish_json(finish),
            ids,
            b"}]",
            self._tail(),
        )
        return b"".join(parts)


@dataclass(slots=True)
class _Text:
    """One choice of a whole answer as it is collected."""

    text: list[str] = field(default_factory=list)
    logprobs: LegacyLogprobs = field(default_factory=LegacyLogprobs)
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class CompletionWhole:
    """One body, complete when `close` is called."""

    def __init__(self, shape: CompletionShape) -> None:
        self._shape = shape
        self._choices = [_Text() for _ in range(shape.choices)]
        self._unopened = set(range(shape.choices)) if shape.echo else set[int]()

    def render(self, deltas: Sequence[Delta]) -> bytes:
        for delta in deltas:
            if delta.choice in self._unopened:
                self._echo(delta.choice)
            self._add(self._choices[delta.choice], delta)
        return b""

    def _echo(self, choice: int) -> None:
        self._unopened.discard(choice)
        self._choices[choice].text.append(self._shape.echo_text(choice))
        if self._shape.extras.logprobs:
            self._shape.add_prompt(self._choices[choice].logprobs, choice)

    def _add(self, text: _Text, delta: Delta) -> None:
        text.text.append(delta.text)
        text.finish = delta.finish
        if delta.token_id is not None:
            text.token_ids.append(delta.token_id)
        if self._shape.extras.logprobs:
            self._shape.add_token(text.logprobs, delta)

    def close(self, usage: Usage) -> bytes:
        choices = b",".join(self._choice(index, text) for index, text in enumerate(self._choices))
        head = self._shape.envelope.head("text_completion")
        return head + b"[" + choices + b'],"usage":' + usage_json(usage) + b"}"

    def _choice(self, index: int, text: _Text) -> bytes:
        ids = b""
        if self._shape.extras.token_ids:
            prompt = orjson.dumps(self._shape.run(index).prompt.token_ids)
            ids = b',"token_ids":' + orjson.dumps(text.token_ids) + b',"prompt_token_ids":' + prompt
        parts = (
            b'{"index":%d,"text":' % index,
            orjson.dumps("".join(text.text)),
            b',"logprobs":',
            text.logprobs.take_json() if self._shape.extras.logprobs else b"null",
            b',"finish_reason":',
            finish_json(text.finish),
            ids,
            b"}",
        )
        return b"".join(parts)
