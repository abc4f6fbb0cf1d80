"""SmolLM2-135M-Instruct, a real model from a GGUF file: chats in float32 equal transformers' and make sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.request import FinishReason, Request, SamplingParams
from kvbaton.engine.text.tokenizer import Tokenizer
from support.http_endpoint import MODEL_ID, http_endpoint
from support.local_cluster import EngineOptions, LocalCluster
from support.real_model import END, ROOT, reference_logits, reference_tokens
from support.worker_bench import WorkerBench

pytestmark = [pytest.mark.model, pytest.mark.slow]

QUESTIONS = ("What is the capital of France?", "List three prime numbers.", "Say hello in Spanish.")
NUM_TOKENS = 24
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of Germany?"},
]


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Tokenizer:
    return Tokenizer.load(real_model)


def chat(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[int]:
    return tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)


def bench_of(model: Path, kv_bytes: int = 256 << 20) -> WorkerBench:
    config = EngineConfig(model, "cpu", dtype="float32", threads=1, cache=CacheConfig(kv_memory_bytes=kv_bytes))
    return WorkerBench(Engine.load(config), BatchConfig(max_tokens_per_step=512, prefill_chunk_tokens=64))


def greedy(name: str, prompt: list[int], max_tokens: int = NUM_TOKENS) -> Request:
    return Request(name, tuple(prompt), SamplingParams(max_tokens, temperature=0.0, stop_token_ids=(END,)))


def test_the_file_says_what_it_is(real_model: Path, tokenizer: Tokenizer) -> None:
    """Guards numbers that no test of a made-up file can: those of a file that others wrote."""
    config = load_model_config(real_model)
    assert (config.architecture, config.num_layers, config.vocab_size) == ("LlamaForCausalLM", 30, 49152)
    assert (config.eos_token_ids, config.dtype, config.tie_word_embeddings) == ((END,), "bfloat16", True)
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompt)[:13] == [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519]
    assert len(tokenizer.encode("1234567")) == 7
    assert tokenizer.decode(tokenizer.encode("naïve 東京, it's 1999")) == "naïve 東京, it's 1999"


def test_chats_equal_transformers_and_stop(real_model: Path, tokenizer: Tokenizer) -> None:
    """Three questions and a second turn, at once: chunks of 64, ragged batches, ends at <|im_end|>."""
    prompts = [chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts.append(chat(tokenizer, TURNS))
    wanted = [reference_tokens(real_model, prompt, NUM_TOKENS) for prompt in prompts]
    bench = bench_of(real_model)
    for i, prompt in enumerate(prompts):
        bench.submit(greedy(f"r{i}", prompt))
    bench.run()
    assert [bench.tokens(f"r{i}") for i in range(len(prompts))] == wanted
    ends = [bench.finish(f"r{i}") for i in range(len(prompts))]
    assert ends == [FinishReason.STOP if END in tokens else FinishReason.LENGTH for tokens in wanted]
    assert ends.count(FinishReason.STOP) >= 2
    assert "Paris" in tokenizer.decode(wanted[0])
    assert "Berlin" in tokenizer.decode(wanted[-1])
    bench.assert_clean()


def test_a_context_of_4k_tokens(real_model: Path, tokenizer: Tokenizer) -> None:
    """Guards positions far from the start, through 64 chunks: the token after a long text is transformers' own."""
    prompt = tokenizer.encode((ROOT / "docs" / "architecture.md").read_text())[:4096]
    assert len(prompt) == 4096
    best = reference_logits(real_model, prompt).topk(2)
    bench = bench_of(real_model, 512 << 20)
    bench.submit(greedy("long", prompt, 1))
    bench.run()
    assert (best.values[0] - best.values[1]).item() > 0.01, "the reference is undecided: this text proves nothing"
    assert bench.tokens("long") == [best.indices[0].item()]


@pytest.mark.ucx
async def test_split_over_ucx_it_answers(real_model: Path, tokenizer: Tokenizer) -> None:
    """The whole path: template, prefill, KV over UCX, decode, text; then a second turn on cached blocks."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    wanted = reference_tokens(real_model, chat(tokenizer, messages), NUM_TOKENS)
    follow_up = [*messages, {"role": "assistant", "content": "The capital of France is Paris."}]
    follow_up.append({"role": "user", "content": "Which river flows through it?"})
    then = reference_tokens(real_model, chat(tokenizer, follow_up), NUM_TOKENS)
    body = {"model": MODEL_ID, "max_tokens": NUM_TOKENS, "temperature": 0}
    async with (
        LocalCluster(real_model, options=EngineOptions(kv_memory_bytes=128 << 20)) as cluster,
        http_endpoint(cluster, real_model) as http,
    ):
        first = (await http.post("/v1/chat/completions", json=body | {"messages": messages})).json()
        second = (await http.post("/v1/chat/completions", json=body | {"messages": follow_up})).json()
        assert first["choices"][0]["message"]["content"] == "The capital of France is Paris."
        assert first["choices"][0]["finish_reason"] == "stop"
        assert first["usage"]["completion_tokens"] == len(wanted)
        assert second["choices"][0]["message"]["content"] == tokenizer.decode(then)
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert cluster.client.counters.placed_pairs == 2
        await cluster.assert_clean()
