"""Trace files: who came when, with how many tokens, sharing which prefix.

Two public formats are read. Mooncake: one JSON object a line with `timestamp` (milliseconds), `input_length`,
`output_length` and `hash_ids`, one id per 512-token prompt block; two requests share a prefix as far as their lists of
ids agree from the start. Azure: a CSV with `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`, no prefix information.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

MOONCAKE_BLOCK_TOKENS = 512
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """A trace file that cannot be read; names the file and the line."""


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request of a trace. `arrival_s` counts from the first request; `hash_ids` is empty where there are none."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[TraceEntry]:
    """The first `limit` requests of a `.jsonl` (Mooncake) or `.csv` (Azure) trace, in order of arrival."""
    readers = {".jsonl": _read_mooncake, ".csv": _read_azure}
    reader = readers.get(path.suffix)
    if reader is None:
        raise TraceError(f"{path}: a trace is a Mooncake .jsonl or an Azure .csv file")
    try:
        with path.open(newline="") as lines:
            entries = list(itertools.islice(reader(path, lines), limit))
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    if not entries:
        raise TraceError(f"{path}: no requests in it")
    entries.sort(key=lambda entry: entry.arrival_s)
    return _from_zero(entries)


def _from_zero(entries: list[TraceEntry]) -> list[TraceEntry]:
    first_s = entries[0].arrival_s
    return [TraceEntry(e.arrival_s - first_s, e.input_tokens, e.output_tokens, e.hash_ids) for e in entries]


def _read_mooncake(path: Path, lines: Iterable[str]) -> Iterator[TraceEntry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            yield TraceEntry(
                arrival_s=row["timestamp"] / 1000,
                input_tokens=_tokens(row["input_length"]),
                output_tokens=_tokens(row["output_length"]),
                hash_ids=tuple(row.get("hash_ids", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {number}: not a Mooncake request ({error})") from error


def _read_azure(path: Path, lines: Iterable[str]) -> Iterator[TraceEntry]:
    rows = csv.DictReader(lines)
    missing = [name for name in AZURE_COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise TraceError(f"{path}, line 1: not an Azure trace, no column {', '.join(missing)}")
    for number, row in enumerate(rows, 2):
        try:
            yield TraceEntry(
                arrival_s=_azure_seconds(row["TIMESTAMP"]),
                input_tokens=_tokens(row["ContextTokens"]),
                output_tokens=_tokens(row["GeneratedTokens"]),
            )
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path}, line {number}: not an Azure request ({error})") from error


def _azure_seconds(text: str) -> float:
    """Seconds of `2023-11-16 18:17:03.9799600`. The fraction is read apart: it has more digits than datetime keeps."""
    whole, _, fraction = text.partition(".")
    moment = datetime.fromisoformat(whole).replace(tzinfo=UTC)
    return moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)


def _tokens(value: str | int) -> int:
    """A token count; traces hold a few zeros (an answer that was cut), which a replay must send as 1."""
    count = int(value)
    if count < 0:
        raise ValueError(f"negative token count {count}")
    return max(1, count)
