"""GGUF files load to the same model as the folders that they are made of, to the bit, or are refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize

from kvbaton.engine.gguf_file import GgufFile, find_gguf
from kvbaton.engine.model.gguf_config import gguf_fields
from kvbaton.engine.model.hf_config import load_model_config
from kvbaton.engine.model.loader import load_model, open_checkpoint
from kvbaton.engine.model.weights import slots
from kvbaton.settings import ConfigError
from support.gguf_files import FAMILIES, write_gguf
from support.oracle import TinyModels

CPU = torch.device("cpu")
NO_VALUES = ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0", "Q2_0")


@pytest.fixture(scope="module")
def file(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_as_its_folder_does(family: str, tiny_model: TinyModels, tmp_path: Path) -> None:
    """Guards the names, the rows of q and k, the slices of stacked experts, and every size and flag."""
    folder = tiny_model(family)
    loaded = load_model(write_gguf(folder, tmp_path / "m.gguf", family), CPU, "float32")
    wanted = load_model(folder, CPU, "float32")
    same = {"rms_norm_eps": wanted.config.rms_norm_eps, "rope": wanted.config.rope}
    assert loaded.config.rms_norm_eps == pytest.approx(wanted.config.rms_norm_eps, rel=1e-6)
    assert loaded.config.rope.theta == wanted.config.rope.theta
    assert replace(loaded.config, **same) == wanted.config
    mine, theirs = (list(slots(model.config, model.decoder.weights)) for model in (loaded, wanted))
    assert [slot.name for slot in mine] == [slot.name for slot in theirs]
    assert [a.name for a, b in zip(mine, theirs, strict=True) if not torch.equal(a.target, b.target)] == []


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_values_are_transformers_own(kind: str, tiny_model: TinyModels, tmp_path: Path) -> None:
    """Guards exactness: transformers reads the same file with its own names, its own order of rows."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    folder = tiny_model("llama")
    path = write_gguf(folder, tmp_path / "m.gguf", "llama", GGMLQuantizationType[kind])
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    wanted = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)["tensors"]
    found = dict(open_checkpoint(path, load_model_config(path)).values(frozenset(wanted)))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("kind", [kind for kind in GGMLQuantizationType if kind.name not in NO_VALUES])
def test_every_kind_that_the_library_dequantizes_is_read(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """Guards rows of every block size: what a file holds comes back as the library's own reader gives it."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(3).integers(0, 60, (4, 2 * block_bytes), dtype=np.uint8)
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("one", np.zeros(3, dtype=np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", stored, raw_shape=stored.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile.open(tmp_path / "m.gguf")
    values = file.values(file.tensors[1])
    assert values.shape == (4, 2 * block)
    assert values.dtype == np.float32
    assert np.array_equal(values, dequantize(stored, kind).reshape(values.shape), equal_nan=True)


def test_the_header_is_what_the_librarys_reader_sees(file: Path) -> None:
    mine, theirs = GgufFile.open(file), GGUFReader(file)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert mine.metadata == fields
    assert [(t.name, t.kind, t.offset, t.num_bytes, t.shape) for t in mine.tensors] == [
        (t.name, t.tensor_type, t.data_offset, t.n_bytes, tuple(reversed(t.shape.tolist()))) for t in theirs.tensors
    ]


def test_llama_3s_scaling_is_found_in_its_factors(file: Path, tiny_model: TinyModels, tmp_path: Path) -> None:
    """Guards contexts past the trained one: the file has the divisors of the frequencies, not what they came of."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=scaling)
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](config, CPU)[0].numpy()).astype(np.float32)
    path = tmp_path / "m.gguf"
    _only_tensors(path, {"rope_freqs.weight": factors, "token_embd.weight": np.zeros((8, 64), np.float32)})
    rope = gguf_fields(GgufFile.open(path)).section("rope_parameters")
    assert rope is not None
    assert {name: rope.number(name) for name in scaling if name != "rope_type"} == {
        name: value for name, value in scaling.items() if name != "rope_type"
    }
    assert rope.string("rope_type") == "llama3"
    _only_tensors(path, {"rope_freqs.weight": factors * 1.01, "token_embd.weight": np.zeros((8, 64), np.float32)})
    with pytest.raises(ConfigError, match=r"rope_freqs.weight holds factors that are not Llama 3's"):
        gguf_fields(GgufFile.open(path))


def test_yarn_is_read_as_from_a_folder(tiny_model: TinyModels, tmp_path: Path) -> None:
    """Guards long-context Qwen: the same type, lengths, ramp and scale of cos and sin."""
    folder = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))
    values = json.loads((folder / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 2048}
    values["rope_parameters"] = yarn | {"beta_fast": 16.0}
    (folder / "config.json").write_text(json.dumps(values))
    changes = {"type": "yarn", "factor": 4.0, "original_context_length": 2048, "yarn_beta_fast": 16.0}
    metadata = {f"qwen3__rope__scaling__{name}": value for name, value in changes.items()}
    path = write_gguf(tiny_model("qwen3"), tmp_path / "m.gguf", "qwen3", **metadata)
    assert load_model_config(path).rope == load_model_config(folder).rope
    assert load_model_config(path).rope.attention_factor == pytest.approx(1.1386294)


def _only_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "llama")
    for key in ("embedding_length", "attention.key_length"):
        writer.add_uint32(f"llama.{key}", 64)
    for key in ("attention.head_count", "feed_forward_length", "block_count", "context_length"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("llama.rope.freq_base", 500000.0)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": "gemma2"}, "architecture gemma2 is not supported; supported: llama, qwen2, qwen3"),
        ({"llama__attention__head_count": None}, "llama.attention.head_count is missing"),
        ({"llama__attention__head_count": [4, 4]}, "llama.attention.head_count is of an unexpected type, list"),
        ({"llama__logit_scale": 8.0}, "llama.logit_scale is not supported"),
        ({"llama__rope__scaling__yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multiplier is not supported"),
        ({"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 2.0}, "m.gguf: "),
        ({"llama__rope__scaling__attn_factor": 1.2}, "llama.rope.scaling.attn_factor is not supported"),
        ({"split__count": 3}, "one of several parts; join them first"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count 8 of heads of 16 is not supported"),
        ({"llama__block_count": 5}, "lacks 9 tensors: model.layers.4"),
        ({"llama__block_count": 3}, "holds unexpected 9 tensors: model.layers.3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    changes: dict[str, object], message: str, tiny_model: TinyModels, tmp_path: Path
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", "llama", **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(path, CPU)
    assert str(path) in str(caught.value)


def test_a_kind_without_values_is_refused(tiny_model: TinyModels, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "m.gguf", "llama")
    data = bytearray(path.read_bytes())
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "output_norm.weight")
    data[tensor.field.offset + len(tensor.name) + 8 + 4 + 8] = GGMLQuantizationType.I32
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"model.norm.weight is I32, which is not supported; supported: BF16, F16"):
        load_model(path, CPU)


@pytest.mark.parametrize(
    ("length", "message"),
    [(0, "not a readable GGUF"), (10, "not a readable GGUF"), (5000, "runs past|readable"), (-64, "it is cut short")],
)
def test_a_damaged_file_is_refused(length: int, message: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ConfigError, match=message):
        load_model_config(path)


def test_every_byte_of_the_header_may_be_wrong(file: Path, tmp_path: Path) -> None:
    """Guards against anything but `ConfigError` from a damaged file."""
    path, whole = tmp_path / "m.gguf", file.read_bytes()
    for position in range(0, 2000, 7):
        path.write_bytes(whole[:position] + b"\xff" + whole[position + 1 :])
        try:
            load_model_config(path)
        except ConfigError:
            continue


def test_which_file_a_path_means(file: Path, tiny_model: TinyModels, tmp_path: Path) -> None:
    assert find_gguf(file) == file
    assert find_gguf(tiny_model("llama")) is None
    (tmp_path / "a.gguf").write_bytes(file.read_bytes())
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 2 .gguf files; name one of them"):
        find_gguf(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_model_config(tmp_path / "c.gguf")


def test_dtype_is_the_matrices_own(tiny_model: TinyModels, tmp_path: Path) -> None:
    found = {}
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        path = write_gguf(tiny_model("llama"), tmp_path / f"{kind}.gguf", "llama", GGMLQuantizationType[kind])
        found[kind] = load_model_config(path).dtype
    assert found == {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "bfloat16"}


def test_the_fingerprint_covers_the_values(file: Path, tmp_path: Path) -> None:
    """Guards a pair of engines whose files differ."""
    config, path = load_model_config(file), tmp_path / "m.gguf"
    data = bytearray(file.read_bytes())
    path.write_bytes(data)
    same = open_checkpoint(path, config).digest()
    middle = next(t for t in GgufFile.open(path).tensors if t.name == "blk.2.attn_v.weight")
    data[middle.offset + middle.num_bytes // 2] ^= 1
    path.write_bytes(data)
    assert open_checkpoint(file, config).digest() == same
    assert open_checkpoint(path, config).digest() != same
