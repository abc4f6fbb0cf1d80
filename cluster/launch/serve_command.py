"""`kvbaton serve`: flags and YAML to a `ClusterConfig`, then the launch."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbaton.cluster.config.config_file import Override, load_config
from kvbaton.cluster.launch.screen import Screen
from kvbaton.cluster.launch.stop_signals import StopSignals
from kvbaton.engine.config import ConfigError

EXIT_FAILED, EXIT_USAGE = 1, 2


@dataclass(frozen=True, slots=True)
class Flag:
    """A command-line flag that overrides one setting."""

    name: str
    path: str
    help: str
    kind: type = str


FLAGS = (
    Flag("--model", "model.path", "Hugging Face folder with safetensors"),
    Flag("--served-model-name", "model.name", "what clients pass as model (the folder's name)"),
    Flag("--dtype", "model.dtype", "auto, float32, bfloat16, float16 (auto: the checkpoint's)"),
    Flag("--quantization", "engine.quantization", "none, or int8: 8-bit weights (none)"),
    Flag("--max-model-len", "model.max_model_len", "prompt and completion together (what the model allows)", int),
    Flag("--prefill", "pools.prefill", "prefill engines (1)", int),
    Flag("--decode", "pools.decode", "decode engines (1)", int),
    Flag("--hybrid", "pools.hybrid", "engines that do both (0)", int),
    Flag("--device", "engine.device", "auto, cpu, cuda (auto: cuda where there is a GPU)"),
    Flag("--gpus-per-engine", "engine.gpus", "below 1, engines share a GPU (1)", float),
    Flag("--kv-memory", "engine.kv_memory", "KV pool of an engine, such as 2GiB (measured)"),
    Flag("--block-size", "engine.block_size", "tokens a KV block (32 on a GPU, 16 on CPU)", int),
    Flag("--threads", "engine.threads", "CPU threads of an engine (the cores divided among the engines)", int),
    Flag("--host", "http.host", "address of the endpoint (127.0.0.1)"),
    Flag("--port", "http.port", "port of the endpoint (8000)", int),
    Flag("--replicas", "http.replicas", "ingress processes (1)", int),
    Flag("--redis", "store.redis", "URL of a Redis or Valkey (an embedded one is started)"),
    Flag("--address", "ray.address", "Ray cluster to join (a private one is started)"),
    Flag("--ucx-tls", "transfer.ucx_tls", "UCX_TLS of the engines (all)"),
    Flag("--log-level", "ray.log_level", "debug, info, warning, error (warning)"),
)


def parse(arguments: Sequence[str]) -> tuple[Path | None, list[Override]]:
    """The configuration file, if any, and the flags that were given."""
    parser = argparse.ArgumentParser(
        prog="kvbaton serve",
        description="Start prefill and decode engines with an OpenAI-compatible endpoint. Ctrl-C stops all of it.",
        epilog="Flags override the file. Every setting of the file is shown in deploy/cluster.yaml.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="cluster.yaml")
    for flag in FLAGS:
        parser.add_argument(flag.name, dest=flag.path, type=flag.kind, metavar=_metavar(flag), help=flag.help)
    values = vars(parser.parse_args(arguments))
    overrides = [Override(flag.path, value, flag.name) for flag in FLAGS if (value := values[flag.path]) is not None]
    return values["config"], overrides


def _metavar(flag: Flag) -> str:
    return {int: "N", float: "X"}.get(flag.kind, flag.path.rpartition(".")[2].upper())


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 after Ctrl-C, 1 when a part failed to start, 2 for a configuration that cannot work."""
    screen = Screen()
    path, overrides = parse(arguments)
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        screen.error(str(error))
        return EXIT_USAGE
    logging.basicConfig(level=config.ray.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with StopSignals() as signals:
        from kvbaton.cluster.launch.launch import serve

        try:
            return serve(config, screen, signals)
        except ConfigError as error:
            screen.error(str(error))
            return EXIT_FAILED
