"""How a request travels upstream: the positional form of SUBMIT and ABORT, with one field table for sampling."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from kvbaton.cluster.session.fields import WireError, index_below, natural, number, sized, text
from kvbaton.engine.orders import LegKind, Submit
from kvbaton.engine.request import MAX_SAMPLES, InvalidRequest, Request, SamplingParams
from kvbaton.kvtransfer.messages import PeerAddress

MAX_ID_CHARS = 256
MAX_SALT_CHARS = 4096
MAX_LIST = 1 << 16
MAX_TIMEOUT_S = 7 * 86400.0
RESUME_SUFFIX_CHARS = 32  # what a resume may add to a request id

_LEG_KINDS = tuple(LegKind)


def check_sendable(request: Request) -> None:
    """Raise `InvalidRequest` for what an engine would refuse as malformed: there it costs the session, here one reply.

    Values a client may choose freely are the point; ranges are `SamplingParams.check`'s business.
    """
    _check_text("request_id", request.request_id, MAX_ID_CHARS - RESUME_SUFFIX_CHARS)
    _check_text("cache_salt", request.cache_salt, MAX_SALT_CHARS)
    for name in ("logit_bias", "stop_token_ids"):
        entries = len(getattr(request.sampling, name))
        if entries > MAX_LIST:
            raise InvalidRequest(f"{name} has {entries} entries; at most {MAX_LIST} are allowed", name)
    if request.timeout_s is not None and not 0 < request.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout must be above 0 and at most {MAX_TIMEOUT_S:g} seconds", "timeout")
    context = request.context
    if context and not 0 <= min(context) <= max(context) < 1 << 32:
        raise InvalidRequest("token ids must be integers in [0, 4294967296)", "prompt")


def _check_text(name: str, value: str, max_chars: int) -> None:
    if len(value) > max_chars:
        raise InvalidRequest(f"{name} has {len(value)} characters; at most {max_chars} are allowed", name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{name} is not valid Unicode", name) from None


def submit_fields(submit: Submit) -> list[object]:
    """The inverse of `decode_submit`. Raises `OverflowError` for a token id that is no unsigned 32-bit number."""
    request, peer = submit.request, submit.peer
    wire_request = (
        request.request_id,
        _token_bytes(request.prompt),
        [getattr(request.sampling, name) for name, _ in SAMPLING_FIELDS],
        request.sample_indices,
        _token_bytes(request.emitted),
        request.epoch,
        request.cache_salt,
        request.timeout_s,
    )
    return [_LEG_KINDS.index(submit.kind), None if peer is None else peer_fields(peer), wire_request]


def decode_submit(fields: list[Any]) -> Submit:
    """Fields of a SUBMIT message."""
    leg, peer, request = sized("submit", fields, 3)
    return Submit(
        request=_decode_request(request),
        kind=_LEG_KINDS[index_below("leg", leg, len(_LEG_KINDS))],
        peer=None if peer is None else decode_peer(peer),
    )


def decode_abort(fields: list[Any]) -> tuple[str, int | None]:
    request_id, sample = sized("abort", fields, 2)
    checked = None if sample is None else index_below("sample", sample, MAX_SAMPLES)
    return text("request id", request_id, MAX_ID_CHARS), checked


def _decode_request(fields: object) -> Request:
    request_id, prompt, sampling, samples, emitted, epoch, salt, timeout_s = sized("request", fields, 8)
    if type(samples) is not list or not samples:
        raise WireError("sample indices must be a list of at least one")
    return Request(
        request_id=text("request id", request_id, MAX_ID_CHARS),
        prompt=_tokens("prompt", prompt),
        sampling=_decode_sampling(sampling),
        sample_indices=tuple(index_below("sample index", value, MAX_SAMPLES) for value in samples),
        emitted=_tokens("emitted", emitted),
        epoch=natural("epoch", epoch),
        cache_salt=text("cache_salt", salt, MAX_SALT_CHARS),
        timeout_s=None if timeout_s is None else number("timeout", timeout_s),
    )


def peer_fields(peer: PeerAddress) -> list[object]:
    return [peer.engine_id, peer.generation, peer.host, peer.port]


def decode_peer(fields: object) -> PeerAddress:
    engine_id, generation, host, port = sized("peer", fields, 4)
    return PeerAddress(
        text("peer engine id", engine_id, MAX_ID_CHARS),
        natural("peer generation", generation),
        text("peer host", host, MAX_ID_CHARS),
        index_below("peer port", port, 1 << 16),
    )


def _token_bytes(tokens: Sequence[int]) -> bytes:
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _tokens(name: str, value: object) -> tuple[int, ...]:
    if type(value) is not bytes or len(value) % 4:
        raise WireError(f"{name} must be bytes of 32-bit token ids")
    tokens = array("I", value)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)


def _decode_sampling(fields: object) -> SamplingParams:
    values = sized("sampling", fields, len(SAMPLING_FIELDS))
    checked = {name: read(name, value) for (name, read), value in zip(SAMPLING_FIELDS, values, strict=True)}
    return SamplingParams(**checked)


def _integer(name: str, value: object) -> int:
    if type(value) is not int:
        raise WireError(f"{name} must be an integer, got {value!r:.40}")
    return value


def _optional_natural(name: str, value: object) -> int | None:
    return None if value is None else natural(name, value)


def _flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise WireError(f"{name} must be true or false, got {value!r:.40}")
    return value


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if type(value) is not list:
        raise WireError(f"{name} must be a list of token ids")
    return tuple(natural(name, item) for item in value)


def _biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    if type(value) is not list:
        raise WireError(f"{name} must be a list of pairs")
    pairs = [sized(name, item, 2) for item in value]
    return tuple((natural(name, token_id), number(name, bias)) for token_id, bias in pairs)


SAMPLING_FIELDS: tuple[tuple[str, Callable[[str, object], Any]], ...] = (
    ("max_tokens", natural),
    ("seed", _integer),
    ("temperature", number),
    ("top_k", natural),
    ("top_p", number),
    ("min_p", number),
    ("presence_penalty", number),
    ("frequency_penalty", number),
    ("repetition_penalty", number),
    ("logit_bias", _biases),
    ("logprobs", _optional_natural),
    ("prompt_logprobs", _optional_natural),
    ("n", natural),
    ("min_tokens", natural),
    ("stop_token_ids", _token_ids),
    ("ignore_eos", _flag),
)
