"""llama.cpp through its low-level bindings: one batch of all sequences a step, greedy on the logits."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from protocol import serve

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
MAX_TOKENS = 8192  # of all sequences together


def tensors(folder: Path):
    """(name, dtype, array) of a safetensors file; bfloat16 as uint16."""
    path = folder / "model.safetensors"
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
    data = np.memmap(path, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            kind = {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]]
            yield name, entry["dtype"], np.array(data[begin:end]).view(kind).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in TOP:
        return TOP[name] + ".weight"
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(array, heads: int):
    """Rows of each head in the order in which llama.cpp's "llama" models rotate them."""
    out, inputs = array.shape
    return array.reshape(heads, 2, out // heads // 2, inputs).swapaxes(1, 2).reshape(out, inputs)


def converted(model: str) -> str:
    folder = Path(model)
    out = folder.with_name(folder.name + ".gguf")
    if out.exists():
        return str(out)
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    part = out.with_suffix(".part")
    writer = gguf.GGUFWriter(part, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, dtype, array in tensors(folder):
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            array = interleaved(array, heads)
        if array.ndim == 1 and dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if array.ndim == 1 or dtype == "F32":
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
        else:
            raw = np.ascontiguousarray(array).view(np.uint8)
            writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)
    return str(out)


def load(args):
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(converted(args.model).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = MAX_TOKENS, 4096, 512, 32
    params.n_threads = params.n_threads_batch = args.threads
    if hasattr(params, "kv_unified"):
        params.kv_unified = True
    if args.dtype == "float32":
        params.type_k = params.type_v = 0
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(4096, 0, 1)

    def step(rows):
        """rows: (token, position, sequence, wants logits) -> next token of each row that wants one."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocab,))
                found.append(int(logits.argmax()))
        return found

    def generate(prompts, new_tokens, clock):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [
            (token, at, sequence, at == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        tokens = step(rows)
        clock.first()
        made = len(tokens)
        for n in range(1, new_tokens):
            tokens = step([(token, len(prompts[i]) + n - 1, i, True) for i, token in enumerate(tokens)])
            made += len(tokens)
        return made

    return llama_cpp.__version__, generate


if __name__ == "__main__":
    serve(load)
