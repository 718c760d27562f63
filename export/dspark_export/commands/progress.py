"""The progress bar that all commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dspark_export.publish import Progress as ProgressFunction

console = Console(stderr=True)


@contextmanager
def progress_bar(first: str) -> Iterator[ProgressFunction]:
    """A bar on stderr; yields the function that moves it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(first, total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done, refresh=True)
        bar.update(task, description="done", completed=1.0)
