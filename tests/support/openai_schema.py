"""Replies checked against OpenAI's own OpenAPI document, where the folder that has it is beside the repository.

Two defects of the document are mended first. It says `nullable: true`, which its version of OpenAPI does not know. And
the stream of `/v1/completions` has no schema of its own: it is that of the whole answer, in which neither
`finish_reason` nor `usage` may be null although both are in every chunk but the last. One more difference is the API's
own: the first token of an echoed prompt has no log-probability, and null stands for it.
"""

from __future__ import annotations

import copy
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

DOCUMENT = Path(__file__).parents[3] / "shared" / "openapi" / "openai-openapi.json.gz"


@cache
def _document() -> dict[str, Any]:
    document = json.loads(gzip.decompress(DOCUMENT.read_bytes()))
    schemas = _nullable_mended(document["components"]["schemas"])
    _allow_null_logprobs(schemas["CreateCompletionResponse"])
    schemas["CreateCompletionStreamResponse"] = _completion_chunk(schemas["CreateCompletionResponse"])
    return {"components": {"schemas": schemas}}


def _nullable_mended(node: Any) -> Any:
    if isinstance(node, list):
        return [_nullable_mended(item) for item in node]
    if not isinstance(node, dict):
        return node
    mended = {key: _nullable_mended(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [mended, {"type": "null"}]} if node.get("nullable") is True else mended


def _allow_null_logprobs(completion: dict[str, Any]) -> None:
    choice = completion["properties"]["choices"]["items"]
    lists = choice["properties"]["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        lists[name]["items"] = {"anyOf": [lists[name]["items"], {"type": "null"}]}


def _completion_chunk(completion: dict[str, Any]) -> dict[str, Any]:
    chunk = copy.deepcopy(completion)
    properties = chunk["properties"]
    properties["usage"] = {"anyOf": [properties["usage"], {"type": "null"}]}
    choice = properties["choices"]["items"]["properties"]
    choice["finish_reason"] = {"anyOf": [choice["finish_reason"], {"type": "null"}]}
    return chunk


@cache
def _validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **_document()})


class OpenAISchema:
    """`check(name, value)` fails with every difference between a value and the schema of that name."""

    def check(self, name: str, value: object) -> None:
        errors = [f"{error.json_path}: {error.message[:200]}" for error in _validator(name).iter_errors(value)]
        assert not errors, f"not a {name}:\n" + "\n".join(errors)


def load_schema() -> OpenAISchema:
    if not DOCUMENT.exists():
        pytest.skip(f"OpenAI's schema document is not at {DOCUMENT}")
    return OpenAISchema()
