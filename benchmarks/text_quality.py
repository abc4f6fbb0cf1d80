"""What fewer bits cost in quality: perplexity of a real model on a fixed text, in each number format that runs here.

    make test PYTEST_ARGS=--co                          # fetches SmolLM2-135M-Instruct, or name a model of your own
    python benchmarks/text_quality.py [--model FOLDER or FILE.gguf] [--device cuda] [--windows 8] [--json FILE]

The text is the language reference that comes with Python (`pydoc_data.topics`), cut into windows of 1,024 tokens that
know nothing of each other. A window is read in chunks of 128 tokens, so that later ones attend to KV as it is stored.
Every token but a window's first is judged by the float32 logits of the row before it. The text differs a little from
one Python to the next, so the result names its digest; formats are compared within one run. Prints JSON.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch

from kvbaton.engine.model.decoder import Decoder
from kvbaton.engine.model.loader import load_model
from kvbaton.engine.text.tokenizer import Tokenizer
from kvbaton.kernels.meta import build_attention_meta
from kvbaton.kernels.quantization import FP8

WINDOW, CHUNK, BLOCK_SIZE = 1024, 128, 16
TOPICS = (
    "class",
    "function",
    "with",
    "exceptions",
    "naming",
    "objects",
    "import",
    "execmodel",
    "yield",
    "formatstrings",
)


@dataclass(frozen=True, slots=True)
class Format:
    """How weights and KV are held; `kv` None is the weights' dtype."""

    name: str
    dtype: str
    quantization: str = "none"
    kv: torch.dtype | None = None
    cuda_only: bool = False


FORMATS = (
    Format("float32", "float32"),
    Format("bfloat16", "bfloat16"),
    Format("bfloat16, int8 weights", "bfloat16", "int8"),
    Format("bfloat16, fp8 KV", "bfloat16", kv=FP8, cuda_only=True),
)


@dataclass(frozen=True, slots=True)
class Quality:
    """`over_float32`: this perplexity over float32's of the same run."""

    format: str
    perplexity: float
    over_float32: float


def windows(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """`count` windows of token ids from the start of the text."""
    ids = tokenizer.encode(text(), add_special_tokens=False)
    found = [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]
    if len(found[-1]) < WINDOW:
        raise SystemExit(f"the text has {len(ids)} tokens, {count} windows need {count * WINDOW}")
    return found


def text() -> str:
    return "\n\n".join(topics[name] for name in TOPICS)


def loss_of(decoder: Decoder, window: list[int], kv_dtype: torch.dtype) -> float:
    """The sum over the window's tokens but the first of -log of the probability that the model gave them."""
    config, device = decoder.config, decoder.device
    blocks = -(-len(window) // BLOCK_SIZE)
    shape = (blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    kv_cache = torch.zeros(shape, dtype=kv_dtype, device=device)
    total = 0.0
    for start in range(0, len(window), CHUNK):
        ids = torch.tensor(window[start : start + CHUNK], device=device)
        meta = build_attention_meta([len(ids)], [start + len(ids)], [range(blocks)], BLOCK_SIZE, device, num_decodes=0)
        logits = decoder.logits(decoder.forward(ids, kv_cache, meta)).float()
        following = torch.tensor(window[start + 1 : start + 1 + CHUNK], device=device)
        rows = logits[: len(following)]
        total += float(torch.nn.functional.cross_entropy(rows, following, reduction="sum"))
    return total


def measure(model: Path, device: torch.device, pieces: list[list[int]]) -> Iterator[Quality]:
    """Each format that the device runs, float32 first."""
    plain = math.nan
    for kind in FORMATS:
        if kind.cuda_only and device.type != "cuda":
            continue
        decoder = load_model(model, device, kind.dtype, quantization=kind.quantization).decoder
        loss = sum(loss_of(decoder, piece, kind.kv or decoder.dtype) for piece in pieces)
        perplexity = math.exp(loss / (len(pieces) * (WINDOW - 1)))
        plain = perplexity if kind.name == "float32" else plain
        yield Quality(kind.name, round(perplexity, 4), round(perplexity / plain, 5))
        del decoder
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pieces = windows(Tokenizer.load(args.model), args.windows)
    with torch.inference_mode():
        found = list(measure(args.model, torch.device(args.device), pieces))
    report = {
        "command": f"python benchmarks/text_quality.py --model {args.model} --device {args.device}"
        f" --windows {args.windows}",
        "python": platform.python_version(),
        "text": hashlib.blake2b(text().encode(), digest_size=8).hexdigest(),
        "tokens": len(pieces) * (WINDOW - 1),
        "formats": [asdict(quality) for quality in found],
    }
    printed = json.dumps(report, indent=2)
    print(printed)
    if args.json:
        args.json.write_text(printed + "\n")


if __name__ == "__main__":
    main()
