"""What `kvbaton serve` shows: one line a step, with a spinner on a terminal and without one in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from kvbaton.router.engine_info import EngineInfo

_NAME_WIDTH = 10


class Step:
    """A step in progress: say what happens inside it, and at the end what came of it."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self.result = ""

    def note(self, text: str) -> None:
        """Progress inside the step."""
        self._note(text)


@dataclass(frozen=True, slots=True)
class Link:
    """How one engine reaches another. `bandwidth` in bytes a second, None where it was not measured."""

    source: str
    target: str
    transports: str
    bandwidth: float | None = None


class Screen:
    """Lines on standard output."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.console.file = self.console.file  # pins the present stream: standard output may be redirected later

    def line(self, text: str = "") -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def error(self, text: str) -> None:
        self.console.print("error:", style="bold red", end=" ")
        self.line(text)

    @contextmanager
    def step(self, name: str, doing: str) -> Iterator[Step]:
        """A spinner while the block runs, then one line with its `result` and the seconds it took."""
        started = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(f"{name:<{_NAME_WIDTH}} {doing}", spinner="dots") as status:
                step = Step(lambda text: status.update(f"{name:<{_NAME_WIDTH}} {text}"))
                yield step
        else:
            self.line(f"{name:<{_NAME_WIDTH}} {doing} ...")
            step = Step(lambda text: self.line(f"{name:<{_NAME_WIDTH}} {text}"))
            yield step
        self.console.print("✓", style="green", end=" ")
        self.line(f"{name:<{_NAME_WIDTH}} {step.result}  ({time.monotonic() - started:.1f} s)")

    def pools(self, engines: Sequence[EngineInfo]) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("engine", "role", "state", "KV blocks", "tokens", "chunk", "session / kv"):
            table.add_column(column, justify="right" if column in ("KV blocks", "tokens", "chunk") else "left")
        for info in engines:
            table.add_row(
                f"{info.engine_id}/{info.generation}",
                info.role.value,
                info.state.value,
                f"{info.num_blocks}",
                f"{info.num_blocks * info.block_size}",
                f"{info.prefill_chunk_tokens}",
                f"{info.host}:{info.session_port} / {info.kv_port}",
            )
        self.line()
        self.console.print(table)

    def links(self, links: Sequence[Link]) -> None:
        for link in links:
            speed = "" if link.bandwidth is None else f", {link.bandwidth / 1e9:.2f} GB/s"
            self.line(f"UCX        {link.source} -> {link.target}: {link.transports}{speed}")

    def endpoint(self, base_url: str, model: str, needs_key: bool) -> None:
        """Where it is, and a command that shows it at work."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 32,
            "stream": True,
        }
        key = ' -H "Authorization: Bearer $KEY"' if needs_key else ""
        self.line()
        self.line(f"endpoint   {base_url}/v1   model {model}")
        self.line()
        self.line(f"  curl -N {base_url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\")
        self.line(f"    -d '{json.dumps(body)}'")
        self.line()
        self.line("Ctrl-C stops everything.")
