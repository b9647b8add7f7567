"""The progress bar of an engine build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from compiler.backend.tensorrt import Progress


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar on the terminal for `tensorrt.build`; silent where standard error is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def show(fraction: float, phase: str) -> None:
            bar.update(task, completed=fraction, description=f"{title}: {phase}")

        yield show
