"""One call's generation: its prompts times its choices, from token outputs to text.

    client.generate  ->  Feed (one stream, or several merged)  ->  ChoiceText (detokenize, stop strings)  ->  Delta

`Generation.next` gives what arrived together. Whatever happens to a call, its owner calls `aclose` at the end, and each
stream that was opened is closed exactly once: that is what aborts unfinished work on the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvbaton.cluster.client.api import EngineLost, GenerationClient
from kvbaton.cluster.http.feed import Feed, open_feed
from kvbaton.cluster.http.metrics import CallTimer
from kvbaton.cluster.http.stop_strings import StopMatcher
from kvbaton.engine.request import FinishReason, Request, TokenLogprobs, TokenOutput
from kvbaton.engine.text.detokenizer import IncrementalDetokenizer


class Delta(NamedTuple):
    """One step of one choice. A named tuple, not a dataclass: one is made per token."""

    choice: int
    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a call. `cached` of the `prompt` tokens were not computed again."""

    prompt: int
    completion: int
    cached: int


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens become a choice's text. `discard`: the one token the engine makes is not wanted (max_tokens 0)."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    discard: bool = False


class ChoiceText:
    """One choice as it grows. `index` is its number in the answer."""

    __slots__ = ("_detokenizer", "_matcher", "_rules", "cut", "done", "index", "tokens")

    def __init__(self, index: int, detokenizer: IncrementalDetokenizer, rules: TextRules) -> None:
        self.index = index
        self.tokens = 0
        self.done = False
        self.cut = False  # ended here, by a stop string; the engine does not know yet
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(rules.stops, rules.include_stop) if rules.stops else None
        self._rules = rules

    def feed(self, output: TokenOutput) -> Delta:
        """The next output of this choice, which must not be done."""
        if self._rules.discard:
            self.done = True
            return Delta(self.index, "", None, None, FinishReason.LENGTH)
        finish = output.finish
        text = ""
        if output.token_id is not None:
            self.tokens += 1
            # STOP comes with the stop token itself, whose text is not part of the answer.
            if finish is not FinishReason.STOP or self._rules.include_stop:
                text = self._detokenizer.push(output.token_id)
        if finish is not None:
            text += self._detokenizer.flush()
        if self._matcher is not None:
            text, finish = self._match(self._matcher, text + self._held(self._matcher, text), finish)
        self.done = finish is not None
        return Delta(self.index, text, output.token_id, output.logprobs, finish)

    def _held(self, matcher: StopMatcher, text: str) -> str:
        """Text that the detokenizer could still hold: a stop string counts with the token that completes it."""
        held = self._detokenizer.whole()
        if held and (self.tokens <= self._rules.min_tokens or matcher.would_match(text + held)):
            return self._detokenizer.flush()
        return ""

    def _match(self, matcher: StopMatcher, text: str, finish: FinishReason | None) -> tuple[str, FinishReason | None]:
        scan = matcher.push(text, armed=self.tokens > self._rules.min_tokens)
        if scan.stop is not None:
            self.cut = finish is None
            return scan.text, FinishReason.STOP
        return (scan.text if finish is None else scan.text + matcher.flush()), finish


class PromptRun:
    """One prompt: its request, and a choice for each sample of it."""

    __slots__ = ("cached_tokens", "choices", "prompt_logprobs", "request")

    def __init__(self, request: Request, choices: Sequence[ChoiceText]) -> None:
        self.request = request
        self.choices = list(choices)
        self.cached_tokens: int | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    @property
    def cut(self) -> bool:
        """Over for the client, but not for the engine."""
        return self.done and any(choice.cut for choice in self.choices)

    def feed(self, outputs: Sequence[TokenOutput]) -> list[Delta]:
        """Raises `EngineLost` for an output that reports a failure."""
        deltas: list[Delta] = []
        for output in outputs:
            if output.cached_tokens is not None or output.prompt_logprobs is not None:
                self._note_prompt(output)
            choice = self.choices[output.sample]
            if choice.done:
                continue  # was on its way when the stop string matched
            if output.finish is FinishReason.ABORT or output.finish is FinishReason.ERROR:
                raise EngineLost("the engine ended this request before it was complete")
            deltas.append(choice.feed(output))
        return deltas

    def _note_prompt(self, output: TokenOutput) -> None:
        """The first report counts: a resume tells what its own prefill found."""
        if self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
        if self.prompt_logprobs is None:
            self.prompt_logprobs = output.prompt_logprobs


class Generation:
    """Opens its streams on the first `next`; `aclose` closes what is open."""

    def __init__(self, client: GenerationClient, runs: Sequence[PromptRun], timer: CallTimer) -> None:
        self.runs = list(runs)
        self._client = client
        self._timer = timer
        self._feed: Feed = open_feed(client, [run.request for run in runs])

    async def next(self) -> list[Delta] | None:
        """What arrived since the last call, never empty; None after the end. Raises `ServiceError`."""
        while (arrival := await self._feed.next()) is not None:
            run = self.runs[arrival.stream]
            deltas = run.feed(arrival.outputs)
            if deltas:
                self._timer.arrived(len(deltas))
                if any(delta.finish is not None for delta in deltas):
                    await self._choices_ended(arrival.stream, deltas)
                return deltas
        if not all(run.done for run in self.runs):
            raise EngineLost("the token stream ended before the answer was complete")
        usage = self.usage()
        self._timer.finished(usage.prompt, usage.cached)
        return None

    async def _choices_ended(self, stream: int, deltas: Sequence[Delta]) -> None:
        """Count the choices that end with these deltas, and end those on the engines that a stop string has cut."""
        run = self.runs[stream]
        for delta in deltas:
            if delta.finish is not None:
                self._timer.choice_ended(delta.finish)
        if run.cut:
            await self._feed.stop(stream)
            return
        for sample, choice in enumerate(run.choices):
            if choice.cut and any(delta.finish and delta.choice == choice.index for delta in deltas):
                self._client.finish_sample(run.request.request_id, sample)

    def usage(self) -> Usage:
        return Usage(
            prompt=sum(len(run.request.prompt) for run in self.runs),
            completion=sum(choice.tokens for run in self.runs for choice in run.choices),
            cached=sum(run.cached_tokens or 0 for run in self.runs),
        )

    async def aclose(self) -> None:
        """Abort what is not finished. May be called in any state and more than once."""
        self._timer.closed(sum(not choice.done for run in self.runs for choice in run.choices))
        await self._feed.aclose()
