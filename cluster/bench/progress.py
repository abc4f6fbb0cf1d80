"""The progress bar of a run, drawn only twice a second: drawing holds the interpreter while tokens wait."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvbaton.cluster.bench.record import RequestRecord

REFRESH_PER_S = 2.0


class ProgressBar:
    """A context manager and run observer: requests done of total, under way, failed, output tokens."""

    def __init__(self, console: Console, total: int | None, enabled: bool) -> None:
        self._bar = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(
                "{task.fields[running]} under way · {task.fields[failed]} failed · {task.fields[tokens]} tokens"
            ),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=REFRESH_PER_S,
            disable=not enabled,
        )
        self._task = self._bar.add_task("requests", total=total, running=0, failed=0, tokens=0)
        self._running = 0
        self._failed = 0
        self._tokens = 0

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def started(self) -> None:
        self._running += 1
        self._bar.update(self._task, running=self._running)

    def finished(self, record: RequestRecord) -> None:
        self._running -= 1
        self._failed += not record.ok
        self._tokens += record.output_tokens
        self._bar.update(self._task, advance=1, running=self._running, failed=self._failed, tokens=self._tokens)
