"""The command-line flags that override settings of the file: names and paths. The rest they have from the settings."""

from __future__ import annotations

import argparse

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.cluster.config.config_file import Override
from kvbaton.settings import Field, Setting, operator_fields, written

FLAGS = {
    "--model": "model.path",
    "--served-model-name": "model.name",
    "--dtype": "model.dtype",
    "--quantization": "engine.quantization",
    "--max-model-len": "model.max_model_len",
    "--prefill": "pools.prefill",
    "--decode": "pools.decode",
    "--hybrid": "pools.hybrid",
    "--device": "engine.device",
    "--gpus-per-engine": "engine.gpus",
    "--kv-memory": "engine.kv_memory",
    "--block-size": "engine.block_size",
    "--threads": "engine.threads",
    "--host": "http.host",
    "--port": "http.port",
    "--replicas": "http.replicas",
    "--redis": "store.redis",
    "--address": "ray.address",
    "--ucx-tls": "transfer.ucx_tls",
    "--log-level": "ray.log_level",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag, with the meaning, the values and the default of its setting."""
    settings = {setting.path: (setting, field) for setting, field in operator_fields(ClusterConfig)}
    for name, path in FLAGS.items():
        setting, field = settings[path]
        kind = field.rule.kind if field.rule.kind in (int, float) and not field.rule.is_size else str
        metavar = {int: "N", float: "X"}.get(kind, path.rpartition(".")[2].upper())
        parser.add_argument(name, dest=path, type=kind, metavar=metavar, help=_help(setting, field))


def given_flags(values: argparse.Namespace) -> list[Override]:
    """The flags that were given, of what the parser returned."""
    found = ((name, path, getattr(values, path)) for name, path in FLAGS.items())
    return [Override(path, value, name) for name, path, value in found if value is not None]


def _help(setting: Setting, field: Field) -> str:
    words = f"; {field.rule.allowed}" if field.rule.words else ""
    return f"{setting.meaning}{words} ({setting.unset or written(field)})".replace("%", "%%")
