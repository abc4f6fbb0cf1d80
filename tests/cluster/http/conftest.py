"""Fixtures of the HTTP tests: the tiny tokenizer and OpenAI's schema."""

from __future__ import annotations

import pytest

from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_support import load_tokenizer
from support.openai_schema import OpenAISchema, load_schema


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def schema() -> OpenAISchema:
    """Tests that use it need the marker `shared`."""
    return load_schema()
