"""One ingress replica: store, membership, sessions to the engines, tokenizer, and the HTTP application. No Ray."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random

from fastapi import FastAPI

from kvbaton import __version__
from kvbaton.cluster.client.client import ClientConfig, ClusterClient
from kvbaton.cluster.config.cluster_config import HttpConfig
from kvbaton.cluster.http.app import create_app
from kvbaton.cluster.http.call import cancel_call
from kvbaton.cluster.http.metrics import HttpMetrics
from kvbaton.cluster.http.service import ModelCard, SamplingDefaults, Service
from kvbaton.cluster.ingress.engine_metrics import EngineMetrics
from kvbaton.cluster.store.cancel_feed import CancelFeed
from kvbaton.cluster.store.prefix_feed import PrefixFollower
from kvbaton.cluster.store.redis_store import RedisStore
from kvbaton.cluster.store.registry import Membership
from kvbaton.cluster.store.store import Store, StoreAddress
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.json_fields import JsonFields
from kvbaton.engine.model.model_config import ModelConfig
from kvbaton.engine.text.tokenizer import Tokenizer
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router

_ENGINE_WAIT_S = 20.0
_NOT_APPLIED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "num_beams",
    "penalty_alpha",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "typical_p",
    "watermarking_config",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IngressSpec:
    """What an ingress is built from; sent to its process."""

    store: StoreAddress
    secret: bytes = field(repr=False)
    model: Path
    model_id: str
    max_model_len: int | None
    router: RouterConfig
    client: ClientConfig
    http: HttpConfig
    api_keys: tuple[str, ...] = field(default=(), repr=False)


class Ingress:
    """Made by `open`. `close` ends its sessions and aborts what is in flight; `stop_in` warns clients before that."""

    def __init__(
        self,
        store: Store,
        membership: Membership,
        client: ClusterClient,
        prefixes: PrefixFollower,
        cancels: CancelFeed,
        service: Service,
    ) -> None:
        self._store = store
        self._membership = membership
        self._client = client
        self._prefixes = prefixes
        self._cancels = cancels
        self.service = service

    @classmethod
    async def open(cls, spec: IngressSpec) -> Ingress:
        """Connect to the store and follow its engines. Raises `StoreUnavailable` and `ConfigError`."""
        store = await RedisStore.open(spec.store.url, spec.store.namespace)
        membership = Membership(store)
        await membership.start()
        client = _client(membership, spec)
        await client.start()
        await _wait_for_engines(client)
        prefixes = PrefixFollower(store, client.router.index)
        membership.subscribe(prefixes.follow)
        prefixes.start()
        service = _service(spec, membership, client)
        cancels = CancelFeed(store, partial(_cancel, client, service))
        if spec.http.replicas > 1:
            service = replace(service, cancel_elsewhere=cancels.tell)
            cancels.start()
        return cls(store, membership, client, prefixes, cancels, service)

    def app(self) -> FastAPI:
        return create_app(self.service)

    def stop_in(self, seconds: float) -> None:
        """Requests in progress may go on so long; then they, and any that still come, end with an error saying why."""
        asyncio.get_running_loop().call_later(seconds, self._client.stop)

    async def close(self) -> None:
        await self._client.close()
        await self._prefixes.close()
        await self._cancels.close()
        await self._membership.close()
        await self._store.close()


def _cancel(client: ClusterClient, service: Service, call_id: str) -> None:
    if cancel_call(client, call_id, service.limits.max_prompts):
        log.info("call %s was cancelled at another replica", call_id)


async def _wait_for_engines(client: ClusterClient) -> None:
    """A replica that takes requests should be able to serve them. If none of its engines answers, it starts anyway."""
    try:
        await asyncio.wait_for(client.wait_ready(), _ENGINE_WAIT_S)
    except TimeoutError:
        log.warning("no engine could be reached within %g s; serving goes on when one can", _ENGINE_WAIT_S)


def _client(membership: Membership, spec: IngressSpec) -> ClusterClient:
    return ClusterClient(
        membership,
        Router(spec.router, time.monotonic, Random()),
        spec.secret,
        f"ingress-{uuid.uuid4().hex[:12]}",
        replace(
            spec.client,
            request_timeout_s=spec.http.request_timeout_s,
            max_in_flight=spec.http.max_ongoing_requests * 4,  # a call may have several prompts
        ),
    )


def _service(spec: IngressSpec, membership: Membership, client: ClusterClient) -> Service:
    config, tokenizer = load_model_config(spec.model), Tokenizer.load(spec.model)
    lengths = [info.max_model_len for info in membership.engines]
    lengths.append(spec.max_model_len or config.max_position_embeddings)
    metrics = HttpMetrics()
    metrics.registry.register(EngineMetrics(lambda: membership.engines, client))
    return Service(
        client=client,
        tokenizer=tokenizer,
        model=ModelCard(
            id=spec.model_id,
            vocab_size=config.vocab_size,
            max_model_len=min(lengths),
            eos_ids=end_tokens(config, tokenizer),
            created=int(time.time()),
        ),
        version=__version__,
        defaults=sampling_defaults(spec.model),
        limits=spec.http.limits,
        api_keys=spec.api_keys,
        metrics=metrics,
    )


def end_tokens(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a completion: those of config.json and generation_config.json, and the tokenizer's `eos_token`.

    The last is the one that a fine-tune for chat was trained to end with where it left the other files as they were.
    """
    known = {*config.eos_token_ids} if tokenizer.eos_id is None else {*config.eos_token_ids, tokenizer.eos_id}
    return tuple(sorted(token for token in known if token < config.vocab_size))


def sampling_defaults(folder: Path) -> SamplingDefaults:
    """What the model's own generation_config.json recommends, for requests that leave a value out."""
    path = folder / "generation_config.json"
    if not path.exists():
        return SamplingDefaults()
    fields = JsonFields.read(path)
    ignored = [name for name in _NOT_APPLIED if fields.names_other(name, (False, 0, 1, "", [], {}))]
    if ignored:
        log.warning("%s sets %s, which transformers applies and this server does not", path, ", ".join(ignored))
    standard = SamplingDefaults()
    return SamplingDefaults(
        temperature=fields.number("temperature", standard.temperature),
        top_p=fields.number("top_p", standard.top_p),
        top_k=fields.integer("top_k", standard.top_k),
        min_p=fields.number("min_p", standard.min_p),
        repetition_penalty=fields.number("repetition_penalty", standard.repetition_penalty),
        max_new_tokens=_length(fields, "max_new_tokens"),
        max_length=_length(fields, "max_length"),
    )


def _length(fields: JsonFields, name: str) -> int | None:
    length = fields.optional_integer(name)
    if length is not None and length < 1:
        raise fields.error(f"{name} must be at least 1, got {length}")
    return length
