"""One HTTP call's generation: its prompts times its samples, from token outputs to text.

    client.generate  ->  Feed (one stream, or several merged)  ->  Sample (detokenize, stop strings)  ->  Delta

`Generation.next` gives what arrived together. Whatever happens to a call, its owner calls `aclose` at the end, and each
stream that was opened is closed exactly once: that is what aborts unfinished work on the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbaton.cluster.client.api import EngineLost, GenerationClient
from kvbaton.cluster.http.call_timer import CallTimer
from kvbaton.cluster.http.delta import Delta, Usage
from kvbaton.cluster.http.feed import Feed, merged_feed
from kvbaton.cluster.http.prompts import Prompt
from kvbaton.cluster.http.service import Detokenizer
from kvbaton.cluster.http.stop_strings import StopMatcher
from kvbaton.engine.request import FinishReason, Request, TokenLogprobs, TokenOutput


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens become a choice's text. `discard`: the one token the engine makes is not wanted (max_tokens 0)."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special: bool = True
    min_tokens: int = 0
    discard: bool = False


class Sample:
    """One choice as it grows."""

    __slots__ = ("_detokenizer", "_matcher", "_rules", "choice", "cut", "done", "tokens")

    def __init__(self, choice: int, detokenizer: Detokenizer, rules: TextRules) -> None:
        self.choice = choice
        self.tokens = 0
        self.done = False
        self.cut = False  # ended here, by a stop string; the engine does not know yet
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(rules.stops, rules.include_stop) if rules.stops else None
        self._rules = rules

    def feed(self, output: TokenOutput) -> Delta:
        """The next output of this sample, which must not be done."""
        if self._rules.discard:
            self.done = True
            return Delta(self.choice, "", None, None, FinishReason.LENGTH)
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
            text, finish = self._match(self._matcher, text, finish)
        self.done = finish is not None
        return Delta(self.choice, text, output.token_id, output.logprobs, finish)

    def _match(self, matcher: StopMatcher, text: str, finish: FinishReason | None) -> tuple[str, FinishReason | None]:
        scan = matcher.push(text, armed=self.tokens > self._rules.min_tokens)
        if scan.stop is not None:
            self.cut = finish is None
            return scan.text, FinishReason.STOP
        return (scan.text if finish is None else scan.text + matcher.flush()), finish


class PromptRun:
    """One prompt, its request and its samples."""

    __slots__ = ("cached_tokens", "prompt", "prompt_logprobs", "request", "samples")

    def __init__(self, prompt: Prompt, request: Request, samples: Sequence[Sample]) -> None:
        self.prompt = prompt
        self.request = request
        self.samples = list(samples)
        self.cached_tokens: int | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def done(self) -> bool:
        return all(sample.done for sample in self.samples)

    @property
    def cut(self) -> bool:
        """Over for the client, but not for the engine."""
        return self.done and any(sample.cut for sample in self.samples)

    def feed(self, outputs: Sequence[TokenOutput]) -> list[Delta]:
        """Raises `EngineLost` for an output that reports a failure."""
        deltas: list[Delta] = []
        for output in outputs:
            if output.cached_tokens is not None or output.prompt_logprobs is not None:
                self._note_prompt(output)
            sample = self.samples[output.sample]
            if sample.done:
                continue  # was on its way when the stop string matched
            if output.finish is FinishReason.ABORT or output.finish is FinishReason.ERROR:
                raise EngineLost("the engine ended this request before it was complete")
            deltas.append(sample.feed(output))
        return deltas

    def _note_prompt(self, output: TokenOutput) -> None:
        """The first word counts: a resume reports what its own prefill found."""
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
        self._feed: Feed = merged_feed(client, [run.request for run in runs])

    async def next(self) -> list[Delta] | None:
        """What arrived since the last call, never empty; None after the end. Raises `ServiceError`."""
        while (arrival := await self._feed.next()) is not None:
            run = self.runs[arrival.stream]
            deltas = run.feed(arrival.outputs)
            if deltas:
                self._timer.arrived(deltas)
                await self._end_cut(arrival.stream, deltas)
                return deltas
        if not all(run.done for run in self.runs):
            raise EngineLost("the token stream ended before the answer was complete")
        self._timer.finished(self.usage())
        return None

    async def _end_cut(self, stream: int, deltas: Sequence[Delta]) -> None:
        run = self.runs[stream]
        if not any(delta.finish for delta in deltas):
            return
        if run.cut:
            await self._feed.stop(stream)
            return
        for index, sample in enumerate(run.samples):
            if sample.cut and any(delta.finish and delta.choice == sample.choice for delta in deltas):
                self._client.finish_sample(run.request.request_id, index)

    def usage(self) -> Usage:
        return Usage(
            prompt=sum(len(run.prompt.token_ids) for run in self.runs),
            completion=sum(sample.tokens for run in self.runs for sample in run.samples),
            cached=sum(run.cached_tokens or 0 for run in self.runs),
        )

    async def aclose(self) -> None:
        """Abort what is not finished. May be called in any state and more than once."""
        self._timer.closed(sum(not sample.done for run in self.runs for sample in run.samples))
        await self._feed.aclose()
