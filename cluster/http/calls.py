"""From a checked request to its answer: the parts that chat and plain completions share."""

from __future__ import annotations

from collections.abc import Sequence

from kvbaton.cluster.http.call_timer import CallTimer
from kvbaton.cluster.http.envelope import Envelope, Extras
from kvbaton.cluster.http.errors import ApiError, bad_request
from kvbaton.cluster.http.generation import Generation, PromptRun, Sample, TextRules
from kvbaton.cluster.http.prompts import Prompt
from kvbaton.cluster.http.protocol import GenerationFields
from kvbaton.cluster.http.sampling import LogprobDepth, TokenBudget, sampling_params, stop_strings
from kvbaton.cluster.http.service import Service
from kvbaton.engine.request import Request

MAX_SALT_CHARS = 1024


def check_model(name: str | None, service: Service) -> None:
    """Raise 404 for a model that is not the one served; no name means that one."""
    if name is not None and name != service.model.id:
        raise ApiError(404, f"the model {name[:200]!r} does not exist", "model", "model_not_found")


def check_common(body: GenerationFields, service: Service) -> None:
    check_model(body.model, service)
    body.check_supported()
    if body.cache_salt is not None and len(body.cache_salt) > MAX_SALT_CHARS:
        raise bad_request(f"cache_salt is longer than {MAX_SALT_CHARS} characters", "cache_salt")


def envelope(service: Service, call_id: str) -> Envelope:
    return Envelope(call_id, int(service.wall_clock()), service.model.id, service.fingerprint)


def extras(body: GenerationFields, logprobs: bool) -> Extras:
    options = body.stream_options
    return Extras(
        logprobs=logprobs,
        token_ids=bool(body.return_token_ids),
        usage=options is not None and bool(options.include_usage),
        running_usage=options is not None and bool(options.continuous_usage_stats),
    )


def request_name(call_id: str, prompt: int) -> str:
    """What the cluster calls the request of one prompt of a call."""
    return f"{call_id}-{prompt}"


class CallBuilder:
    """Makes the runs of one call, prompt after prompt, numbering its choices."""

    def __init__(
        self,
        service: Service,
        body: GenerationFields,
        call_id: str,
        budget: TokenBudget,
        timeout_s: float | None = None,
    ) -> None:
        self.runs: list[PromptRun] = []
        self._service = service
        self._body = body
        self._call_id = call_id
        self._budget = budget
        self._timeout_s = timeout_s
        self._stops = stop_strings(body.stop, service.limits)

    def add(self, prompt: Prompt, depth: LogprobDepth, discard: bool = False) -> None:
        """One prompt with its n samples. Raises `ApiError` or `InvalidRequest`."""
        service, body = self._service, self._body
        max_tokens = self._budget.resolve(len(prompt.token_ids), service.model.max_model_len)
        params = sampling_params(body, service, max_tokens, depth)
        request = Request(
            request_id=request_name(self._call_id, len(self.runs)),
            prompt=prompt.token_ids,
            sampling=params,
            sample_indices=tuple(range(params.n)),
            cache_salt=body.cache_salt or "",
            timeout_s=self._timeout_s,
        )
        rules = TextRules(
            stops=self._stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special=body.skip_special_tokens is not False,
            min_tokens=params.min_tokens,
            discard=discard,
        )
        self.runs.append(PromptRun(prompt, request, self._samples(prompt, params.n, rules)))

    def _samples(self, prompt: Prompt, count: int, rules: TextRules) -> Sequence[Sample]:
        first = len(self.runs) * count
        new = self._service.tokenizer.detokenizer
        return [Sample(first + index, new(prompt.token_ids, rules.skip_special), rules) for index in range(count)]

    def start(self) -> Generation:
        timer = CallTimer(self._service.metrics, self._service.clock)
        return Generation(self._service.client, self.runs, timer)
