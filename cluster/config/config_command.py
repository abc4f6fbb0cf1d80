"""`kvbaton config`: every setting with its default, as the file that it may stand in or as a table; or checks a file.

deploy/cluster.yaml and the table in docs/operators.md are what this prints; tests compare them.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvbaton.cluster.config.cluster_config import SECTIONS, ClusterConfig
from kvbaton.cluster.config.config_file import load_config
from kvbaton.cluster.config.flags import FLAGS
from kvbaton.settings import ConfigError, Field, Setting, operator_fields, written

EXIT_OK, EXIT_USAGE = 0, 2
_WIDTH = 118
_HEAD = """\
# Every setting with its default, as `kvbaton config` prints them: for `kvbaton serve --config deploy/cluster.yaml`.
# A flag overrides the file. A misspelt key is an error. Sizes are bytes, or texts such as 512MiB; _s is seconds.
"""
_FLAG_OF = {path: name for name, path in FLAGS.items()}


def annotated_yaml() -> str:
    """A file that sets every setting to its default; where that is not a value, the key is in a comment."""
    lines = [_HEAD]
    for section, meaning in SECTIONS.items():
        lines.append(f"{section}:  # {meaning}")
        for setting, field in _settings_of(section):
            lines += textwrap.wrap(_remark(setting, field), _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
            key = setting.path.partition(".")[2]
            lines.append(f"  # {key}:" if field.default is None else f"  {key}: {written(field)}")
        lines.append("")
    return "\n".join(lines)


def markdown_table() -> str:
    """The same for docs/operators.md."""
    lines = ["| key | default | flag | values | meaning |", "|---|---|---|---|---|"]
    for section in SECTIONS:
        for setting, field in _settings_of(section):
            default = setting.unset or f"`{written(field)}`"
            flag = f"`{_FLAG_OF[setting.path]}`" if setting.path in _FLAG_OF else ""
            lines.append(f"| `{setting.path}` | {default} | {flag} | {field.rule.allowed} | {setting.meaning} |")
    return "\n".join(lines) + "\n"


def _settings_of(section: str) -> Iterator[tuple[Setting, Field]]:
    return ((s, field) for s, field in operator_fields(ClusterConfig) if s.path.partition(".")[0] == section)


def _remark(setting: Setting, field: Field) -> str:
    flag = [_FLAG_OF[setting.path]] if setting.path in _FLAG_OF else []
    details = "; ".join([field.rule.allowed, *flag])
    default = f"; default: {setting.unset}" if setting.unset else ""
    return f"{setting.meaning}{default} ({details})"


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 2 for a file that cannot work."""
    parser = argparse.ArgumentParser(
        prog="kvbaton config", description="Print every setting with its default, as a file for kvbaton serve."
    )
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/operators.md instead")
    parser.add_argument("--check", type=Path, metavar="FILE", help="say what is wrong with a file instead")
    given = parser.parse_args(arguments)
    if given.check is None:
        sys.stdout.write(markdown_table() if given.markdown else annotated_yaml())
        return EXIT_OK
    try:
        load_config(given.check)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    sys.stdout.write(f"{given.check}: nothing is wrong\n")
    return EXIT_OK
