"""The terminal: one console, and the stages of a command, each with a line that is there when it begins."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from textwrap import TextWrapper
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from instantrt.compiler.say import At

console = Console(markup=False, emoji=False)  # paths and names of layers may have brackets and colons
PAUSE = 10.0  # seconds between lines of what changes all the time
SPINNER = (SpinnerColumn("line"), TextColumn("{task.description:<60.60}", markup=False))
BAR = (  # with the time, within 80 columns
    TextColumn("{task.description:<20.20}", markup=False),
    BarColumn(10),
    TextColumn("{task.fields[rate]}", markup=False),
)


class Stages:
    """The stages of a command, one after another, and the only clock that they are timed with.

    A terminal shows the running one with a spinner, or with a bar and a rate, and leaves a line with its time. A pipe
    or a file has a line when a stage begins, one now and then while it works, and its time when it ends.

    seconds   of each stage that has ended; those of one name together, of which there were so many `runs`
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.runs = Counter[str]()
        self.started = self.ended = time.monotonic()
        self.name: str | None = None  # of the running one
        self.live = ExitStack()  # its spinner or bar
        self.lock = Lock()  # a writer's threads report side by side

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.end()
        self.live.close()

    def begin(self, name: str, size: int = 0, weights: int = 0) -> None:
        """A stage begins, and the one before ends; with a `size` in bytes, of so many weights, it has a rate."""
        self.end()
        self.name, self.size, self.weights, self.done = name, size, weights, 0
        self.began = self.said = self.ended  # no time is between two stages
        if console.is_interactive:
            shown = Progress(*(BAR if size else SPINNER), TimeElapsedColumn(), console=console, transient=True)
            self.bar = self.live.enter_context(shown)
            self.bar.add_task(name, total=size or None, rate="")
        else:
            say(name)

    def say(self, text: str) -> None:
        """A stage begins, or is at `text`."""
        if isinstance(text, At):
            self.progress(text)
        else:
            self.begin(text)

    def progress(self, doing: str, size: int = 0) -> None:
        """`size` more bytes are done; without any, what the stage is at."""
        with self.lock:
            self.done += size
            rate = ", ".join(filter(None, (self.rate(), self.left())))
            if console.is_interactive:
                text = None if size else doing
                self.bar.update(self.bar.task_ids[0], completed=self.done, rate=rate, description=text)
            elif time.monotonic() - self.said >= PAUSE:
                self.said = time.monotonic()
                say(f"  {self.done / self.size:.0%}, {rate}" if size else f"  {doing}")

    def rate(self) -> str:
        """What a second gets done: `71 M weights/s, 142 MB/s`; "" where nothing is counted."""
        passed = time.monotonic() - self.began
        if not self.done:
            return ""
        weights = f"{self.weights * self.done / self.size / passed / 1e6:,.0f} M weights/s, " if self.weights else ""
        return f"{weights}{self.done / passed / 1e6:,.0f} MB/s"

    def left(self) -> str:
        """At this rate: `3 s left`."""
        passed = time.monotonic() - self.began
        return f"{passed * (self.size - self.done) / self.done:,.0f} s left" if self.done else ""

    def end(self) -> None:
        """The running stage is over."""
        if self.name is None:
            return
        self.ended = time.monotonic()
        took = self.ended - self.began
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + took
        self.runs[self.name] += 1
        self.live.close()
        told = ", ".join(filter(None, (f"{took:.1f} s", self.rate())))
        say(f"{self.name}  {told}" if console.is_interactive else f"  {told}")
        self.name = None

    def summary(self) -> str:
        """Prints stages with their time and share of all; returns how long all took, in words.

        A terminal, which has a line of each with its time, shows only those that ran several times.
        """
        self.end()
        whole = self.ended - self.started
        for name, took in self.seconds.items():
            if self.runs[name] > 1 or not console.is_interactive:
                say(f"{took:8.2f} s {took / whole:4.0%}  {name}")
        return f"{whole:.1f} s"


def say(line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


def tell(text: str, style: str | None = None, *, highlight: bool = True) -> None:
    """Prose: a terminal has lines of whole words, the further ones indented; a pipe or a file has it as it is.

    No word is cut, a path say. A line with a command to copy is none for this.
    """
    if console.is_terminal:
        text = "\n".join(map(filled, text.splitlines()))
    console.print(text, style=style, highlight=highlight, soft_wrap=True)


def filled(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    words = TextWrapper(console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return words.fill(line)
