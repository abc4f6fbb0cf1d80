"""The launcher's own request through the whole path: ingress, prefill, UCX, decode, and back.

It shows that the cluster answers before its address is printed, makes the engines connect, so that the transports which
UCX chose can be shown, and takes the cost of first use off the first client.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from http import HTTPStatus

from kvbaton.cluster.host.engine_host import EngineStats
from kvbaton.cluster.launch.preflight import Launch, LaunchFailed
from kvbaton.cluster.launch.screen import Link
from kvbaton.router.engine_info import EngineInfo, Role

_TIMEOUT_S = 300.0
_UNREADY_S, _RETRY_S = 60.0, 0.5  # an engine may be silent for a moment while everything starts on a busy machine
_NUM_TOKENS = 4
_FIRST_ID = 3  # ids below are special in many vocabularies


def prompt_length(local_prefill_tokens: int, engines: Sequence[EngineInfo]) -> int:
    """Long enough to be worth a transfer of two blocks, short enough for the model."""
    wanted = local_prefill_tokens + max(info.block_size for info in engines) * 2 + 1
    return max(1, min(wanted, min(info.max_model_len for info in engines) - _NUM_TOKENS))


def send_first_request(base_url: str, launch: Launch, engines: Sequence[EngineInfo]) -> float:
    """Seconds from sending to the whole answer, of the last try where the service was not ready at first.

    Raises `LaunchFailed`.
    """
    length = prompt_length(launch.config.router.local_prefill_max_tokens, engines)
    vocab_size = launch.preflight.model.vocab_size
    body = {
        "model": launch.config.model_id,
        "prompt": [(_FIRST_ID + index) % vocab_size for index in range(length)],
        "max_tokens": _NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"Content-Type": "application/json"}
    if launch.config.security.api_keys:
        headers["Authorization"] = f"Bearer {launch.config.security.api_keys[0]}"
    request = urllib.request.Request(f"{base_url}/v1/completions", json.dumps(body).encode(), headers)
    patience_ends = time.monotonic() + _UNREADY_S
    while True:
        started = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                response.read()
            return time.monotonic() - started
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE or started > patience_ends:
                raise LaunchFailed(f"the first request failed: HTTP {error.code}: {_message(error.read())}") from None
        except OSError as error:
            raise LaunchFailed(f"the first request got no answer: {error}") from None
        time.sleep(_RETRY_S)


def _message(body: bytes) -> str:
    """The message of an OpenAI-style error, else the beginning of the body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def links_of(stats: Iterable[EngineStats]) -> list[Link]:
    """The connections over which KV travels, seen from the sending engine."""
    return [
        Link(item.info.engine_id, peer.engine_id, peer.transports, peer.bandwidth_bytes_s)
        for item in sorted(stats, key=lambda item: item.info.engine_id)
        if item.info.role is not Role.DECODE
        for peer in item.transfer.peers
    ]
