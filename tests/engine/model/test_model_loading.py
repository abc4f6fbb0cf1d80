"""What a model folder may hold: every refusal names the file and the option, tensor or field at fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbaton.engine.model.checkpoint import Checkpoint
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import load_model, load_weights, random_model
from kvbaton.engine.model.model_config import Architecture, MoeConfig, RopeConfig, RopeType
from kvbaton.engine.model.weights import Int8Matrix, slots
from kvbaton.settings import ConfigError
from support.oracle import FAMILIES, TinyModels, reference_model

CPU = torch.device("cpu")

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tiny_model: TinyModels, tmp_path: Path) -> Path:
    """A Llama whose files a test may damage."""
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


@pytest.fixture
def moe_folder(tiny_model: TinyModels, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "moe"))


def _edit_config(folder: Path, **changes: Any) -> None:
    """None removes a field."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def _edit_tensors(folder: Path, edit: Edit) -> None:
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def test_config_of_the_llama_checkpoint(folder: Path) -> None:
    config = load_model_config(folder)
    assert config.architecture is Architecture.LLAMA
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 4, 2, 16)
    assert config.rope == RopeConfig(10000.0, RopeType.LLAMA3, 8.0, 1.0, 4.0, 1024)
    assert config.sliding_windows == (None,) * 4
    assert (config.dtype, config.moe, config.eos_token_ids) == ("float32", None, (509, 511))


def test_config_of_the_moe_checkpoint(moe_folder: Path) -> None:
    """Layer 0 is dense by `mlp_only_layers`."""
    config = load_model_config(moe_folder)
    assert config.moe == MoeConfig(8, 2, 64, True, frozenset({1, 2, 3}))
    assert [config.is_moe_layer(layer) for layer in range(4)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; supported: Llama"),
        ({"architectures": []}, "architectures must name exactly one class"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .* is not supported"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope type 'axial' is not supported; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, "short_factor has 1 numbers, and 8 pairs"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_parameters": {"full_attention": {}}, "rope_scaling": None}, "differ by layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported for a Llama"),
        ({"torch_dtype": "float64"}, "dtype 'float64' is not supported; supported: float32, bfloat16, float16"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layer type 'linear_attention' is not supported"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types of LlamaForCausalLM must all be full_attention"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be an integer, got '64'"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads 5 is not a multiple of 2 KV heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"eos_token_id": 600}, "eos_token_id 600 is not in the vocabulary of 512"),
        ({"eos_token_id": "end"}, "eos_token_id must be an integer or a list of integers"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"rope_theta": 0}, "rope_theta 0, factor 8 and attention_factor 1 must be above 0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor 4 must exceed low_freq_factor 4",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 0},
            "sliding_window must be at least 1, got 0",
        ),
    ],
)
def test_unsupported_options_are_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    """Guards against a model that loads and then computes something else."""
    _edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(folder, CPU)
    assert str(folder / "config.json") in str(caught.value)


def test_more_experts_per_token_than_experts_is_refused(moe_folder: Path) -> None:
    _edit_config(moe_folder, num_experts_per_tok=9)
    with pytest.raises(ConfigError, match=r"num_experts_per_tok 9 is not in \[1, 8\]"):
        load_model_config(moe_folder)


def test_two_counts_of_experts_are_refused(moe_folder: Path) -> None:
    """transformers takes whichever of the two comes last in the file."""
    _edit_config(moe_folder, num_local_experts=4)
    with pytest.raises(ConfigError, match="num_local_experts 4 and num_experts 8 contradict"):
        load_model_config(moe_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "config.json is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_damaged_config_is_named(folder: Path, text: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=message):
        load_model(folder, CPU)


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"model folder {tmp_path / 'nowhere'} does not exist"):
        load_model(tmp_path / "nowhere", CPU)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing, and so is model\.safetensors\.index\.json"):
        load_model(folder, CPU)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"pickled weights .* not supported; supported: safetensors"):
        load_model(folder, CPU)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_model(folder, CPU)


def test_truncated_weights_are_named(folder: Path) -> None:
    """Guards an interrupted download."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(folder, CPU)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks tensor model\.norm\.weight of a LlamaForCausalLM"),
        (
            lambda t: [t.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in (1, 2)],
            r"lacks 2 tensors: model\.layers\.1",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}),
            r"unexpected tensor model\.layers\.0\.self_attn\.q_norm\.weight for a LlamaForCausalLM",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(64, 64)}),
            r"k_proj\.weight has shape \[64, 64\], its config says \[32, 64\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            r"model\.norm\.weight is I8, which is not supported; supported: BF16, F16, F32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, edit: Edit, message: str) -> None:
    """Guards against buffers that stay uninitialised and weights that are silently dropped."""
    _edit_tensors(folder, edit)
    with pytest.raises(ConfigError, match=message):
        load_model(folder, CPU)


def test_stored_rotary_buffers_and_tied_heads_are_no_surprise(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Old checkpoints carry both; the first is no weight of ours, the second is the embedding again."""
    folder = Path(shutil.copytree(tiny_model("qwen2"), tmp_path / "model"))
    before = load_model(folder, CPU)
    _edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    _edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    after = load_model(folder, CPU)
    assert after.decoder.weights.lm_head is after.decoder.weights.embed
    assert torch.equal(after.decoder.weights.lm_head, before.decoder.weights.embed)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("head", ["other", "equal", "alone"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_head_beside_a_tie_computes_what_transformers_does(
    tiny_model: TinyModels, tmp_path: Path, family: str, head: str, quantization: str
) -> None:
    """Guards fine-tunes that trained a head of their own under a config that ties: it was dropped in silence."""
    folder = Path(shutil.copytree(tiny_model(family), tmp_path / "model"))
    _edit_config(folder, tie_word_embeddings=True)

    def edit(tensors: dict[str, Any]) -> None:
        embed = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embed.clone() if head == "equal" else embed.flip(0).contiguous()
        if head == "alone":
            del tensors["model.embed_tokens.weight"]

    _edit_tensors(folder, edit)
    loaded = load_model(folder, CPU, quantization=quantization)
    assert loaded.config.tie_word_embeddings == (head != "other")
    wanted = reference_model(folder)
    assert torch.equal(loaded.decoder.weights.embed, wanted.get_input_embeddings().weight)
    lm_head = loaded.decoder.weights.lm_head
    if isinstance(lm_head, Int8Matrix):
        again = Int8Matrix.empty(*lm_head.shape, CPU)
        again.copy_(wanted.lm_head.weight.detach())
        assert torch.equal(lm_head.weight, again.weight)
    else:
        assert torch.equal(lm_head, wanted.lm_head.weight)
        assert (lm_head is loaded.decoder.weights.embed) == (head != "other")


def test_weights_say_their_dtype_where_the_config_does_not(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards memory: 16-bit weights without a dtype in config.json were held in 32 bits."""
    _edit_config(folder, dtype=None, torch_dtype=None)
    assert load_model_config(folder).dtype == "float32"
    _edit_tensors(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert load_model_config(folder).dtype == "bfloat16"
    _edit_tensors(folder, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if "norm" in n}))
    with caplog.at_level("INFO"):
        assert load_model(folder, CPU).decoder.dtype == torch.bfloat16
    assert "config.json names no dtype; most of its weights are bfloat16" in caplog.text
    _edit_config(folder, dtype="float16")
    assert load_model(folder, CPU).decoder.dtype == torch.float16


def test_a_damaged_index_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    for text, message in (
        ("{}", r"index\.json: weight_map is missing"),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors is missing; model\.safetensors\.index\.json"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "which is not a file of this folder"),
        ('{"weight_map": {"a": 3}}', "a must be a string, got 3"),
    ):
        index.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_model(folder, CPU)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "again.safetensors")
    (folder / "model.safetensors").rename(folder / "once.safetensors")
    weight_map = {"a": "once.safetensors", "b": "again.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConfigError, match=r"tensor lm_head\.weight is in .*again\.safetensors and again in"):
        load_model(folder, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slot_is_filled_from_its_tensor(tiny_model: TinyModels, family: str) -> None:
    """Guards the fused buffers: each part holds its tensor, and together the parts are all there is."""
    folder = tiny_model(family)
    config = load_model_config(folder)
    weights = load_weights(config, Checkpoint.open(folder), torch.float32, CPU)
    stored = load_file(folder / "model.safetensors")
    named = {slot.name: slot.target for slot in slots(config, weights)}
    assert named.keys() == stored.keys()
    assert all(torch.equal(named[name], stored[name]) for name in stored)


def test_dtypes_convert_and_unknown_ones_are_refused(folder: Path) -> None:
    half = load_model(folder, CPU, "bfloat16").decoder.weights
    full = load_model(folder, CPU).decoder.weights
    assert torch.equal(half.layers[2].attention.qkv, full.layers[2].attention.qkv.bfloat16())
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported; supported: auto, float32"):
        load_model(folder, CPU, "int8")


def test_fingerprint_tells_models_apart(folder: Path) -> None:
    """Guards the peers' handshake: KV of another model, or of other weights, must never be accepted."""
    original = load_model(folder, CPU).fingerprint
    assert load_model(folder, CPU).fingerprint == original
    assert load_model(folder, CPU, "bfloat16").fingerprint == original  # dtype is compared on its own
    _edit_tensors(folder, lambda t: t["model.layers.3.mlp.down_proj.weight"].mul_(-1))
    weights_changed = load_model(folder, CPU).fingerprint
    _edit_config(folder, rope_theta=20000.0)
    assert len({original, weights_changed, load_model(folder, CPU).fingerprint}) == 3


def test_random_models_are_reproducible(folder: Path) -> None:
    config = load_model_config(folder)
    one, same, other = (random_model(config, seed, CPU) for seed in (1, 1, 2))
    assert torch.equal(one.decoder.weights.lm_head, same.decoder.weights.lm_head)
    assert not torch.equal(one.decoder.weights.lm_head, other.decoder.weights.lm_head)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert random_model(config, 1, CPU, "float16").decoder.dtype == torch.float16
