"""Fixtures that every folder of tests shares: one thread for torch, and the tiny checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.oracle import TinyModels, oracle_tokens

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Results and timings must not depend on how many cores a machine has."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """`tiny_model("llama")` is the folder of that family's tiny checkpoint, made on first use."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session", name="oracle_tokens")
def _oracle_tokens() -> Callable[[Path, list[int], int], list[int]]:
    """`oracle_tokens(folder, prompt, n)`: the n greedy tokens of transformers."""
    return oracle_tokens
