"""`kvbaton serve`: flags and YAML to a `ClusterConfig`, then the launch."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from kvbaton.cluster.config.config_file import Override, load_config
from kvbaton.cluster.config.flags import add_flags, given_flags
from kvbaton.cluster.launch.screen import Screen
from kvbaton.cluster.launch.stop_signals import StopSignals
from kvbaton.settings import ConfigError

EXIT_USAGE = 2


def parse(arguments: Sequence[str]) -> tuple[Path | None, list[Override]]:
    """The configuration file, if any, and the flags that were given."""
    parser = argparse.ArgumentParser(
        prog="kvbaton serve",
        description="Start prefill and decode engines with an OpenAI-compatible endpoint. Ctrl-C stops all of it.",
        epilog="Flags override the file. kvbaton config prints every setting of the file.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="cluster.yaml")
    add_flags(parser)
    values = parser.parse_args(arguments)
    return values.config, given_flags(values)


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
            return EXIT_USAGE
