"""The split on one device: a prefill and a decode engine, a process each, that share the GPU; KV goes over UCX.

What counts is exactness: the tokens equal those of one engine that does both. Needs ucxx and the cluster's packages.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

NEEDED = ("ucxx", "msgpack", "msgspec")
TESTS = Path(__file__).resolve().parents[2] / "tests"
OUTPUTS = 24


def missing() -> list[str]:
    """Packages that this machine lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def wrong_tokens(device: torch.device) -> tuple[int, int]:
    """(tokens that differ, tokens compared), in float32."""
    sys.path.insert(0, str(TESTS))
    from kvbaton.engine.greedy import generate
    from kvbaton.engine.model.loader import load_model
    from kvbaton.engine.tiny import make_tiny, probe_prompts

    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder))
        _compile(Path(folder), device)
        decoder = load_model(Path(folder), device).decoder
        prompts = [prompt for prompt in probe_prompts() if len(prompt) > 20]
        want = [list(result.tokens) for result in generate(decoder, prompts, OUTPUTS)]
        got = asyncio.run(_split(Path(folder), prompts, device))
    wrong = sum(a != b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    return wrong, len(prompts) * OUTPUTS


def _compile(model: Path, device: torch.device) -> None:
    """An engine like the two: they find its kernels in Triton's cache, and start in the time that they are given."""
    from kvbaton.engine.engine import Engine
    from kvbaton.router.engine_info import Role
    from support.engine_process import EngineOptions, host_spec

    Engine.load(host_spec("compiles", Role.HYBRID, model, EngineOptions(device=device.type)).engine)


async def _split(model: Path, prompts: list[list[int]], device: torch.device) -> list[list[int]]:
    from kvbaton.engine.request import Request, SamplingParams
    from support.engine_process import EngineOptions
    from support.local_cluster import LocalCluster

    sampling = SamplingParams(max_tokens=OUTPUTS, temperature=0.0, ignore_eos=True)
    async with LocalCluster(model, options=EngineOptions(device=device.type)) as cluster:
        asked = [cluster.tokens(Request(f"r{i}", tuple(prompt), sampling)) for i, prompt in enumerate(prompts)]
        found = await asyncio.gather(*asked)
        await cluster.assert_clean()
    return [tokens[0] for tokens in found]
