"""The terminal: one console, and progress that is a line now and then where nobody watches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

console = Console(markup=False, emoji=False)  # paths and names of layers may have brackets and colons
Say = Callable[[str], None]
Report = Callable[[str, int], None]  # the tensor that is written, and how many more bytes
PAUSE = 10.0  # seconds between lines of what changes all the time


@contextmanager
def stages(pause: float = 0.0) -> Iterator[Say]:
    """Shows what is being done. Where nobody watches, a line a stage, no two within `pause` seconds."""
    if console.is_interactive:
        with console.status("") as status:
            yield lambda text: status.update(Text(text))
        return
    last = -math.inf

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= pause:
            last = time.monotonic()
            console.print(text, soft_wrap=True)

    yield say


@contextmanager
def writing(total: int) -> Iterator[Report]:
    """A bar of the bytes written, with rate and time left; where nobody watches, a line now and then."""
    if not console.is_interactive:
        with stages(PAUSE) as say:
            say(f"writing {total / 1e6:,.1f} MB of weights")
            yield lambda name, size: say(f"writing {name}")
        return
    columns = (
        TextColumn("{task.description:<36.36}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, size: bar.update(task, advance=size, description=name)
