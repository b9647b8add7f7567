"""Runs ONNX files in a fresh process, and says in words how that ended."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from instantrt.passes.core.lazy import Array

POLL = 0.01  # seconds
SECONDS, BYTES_PER_SECOND = 300, 20 << 20  # a run that takes longer, for its size, hangs
LOADING = ("start", "load")  # what a process is at before its first step
Child = subprocess.Popen[str]
Answers = dict[str, dict[str, Array]]  # step -> output -> value


@dataclass(frozen=True)
class ModelOrder:
    """An ONNX file and what to run of it: see `child`."""

    model: str
    steps: tuple[tuple[str, str], ...]
    form: str = "artifact"
    weights: str = ""
    cache: str = ""
    attempts: bool = False
    libraries: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """What became of one order. `failed` is what went wrong, `during` which step; "" where nothing did."""

    answers: Answers = field(default_factory=dict)
    failed: str = ""
    during: str = ""
    peak_kb: int = 0


@dataclass(frozen=True)
class Running:
    """The child at work on its orders; it has `seconds`, until `deadline`."""

    child: Child
    folder: Path
    orders: int
    seconds: float
    deadline: float

    def outcomes(self) -> list[Ending]:
        """One for each order, once the child has ended."""
        try:
            told, errors = self.child.communicate(timeout=max(0.0, self.deadline - time.monotonic()))
            how = ended(self.child.returncode, errors[-2000:].strip())
        except subprocess.TimeoutExpired:
            self.child.kill()
            told, _ = self.child.communicate()
            how = f"it did not finish within {self.seconds:.0f} s"
        found: list[dict[str, Any]] = [{"failed": how, "during": "start"} for _ in range(self.orders)]
        index = 0
        for event in map(json.loads, told.splitlines()):
            index = event.pop("order", index)
            found[index] |= event
        return [Ending(**each, answers={} if each["failed"] else self.answers(i)) for i, each in enumerate(found)]

    def early(self, index: int) -> Answers:
        """The answers of one order while the child goes on with the next; none where it failed."""
        file = self.folder / f"{index}.pickle"
        while not file.exists() and self.child.poll() is None and time.monotonic() < self.deadline:
            time.sleep(POLL)
        return self.answers(index) if file.exists() else {}

    def answers(self, index: int) -> Answers:
        found: Answers = pickle.loads((self.folder / f"{index}.pickle").read_bytes())  # the child is ours
        return found


def begun() -> Child:
    """A process that imports what it needs, and then waits for the folder of its orders."""
    return subprocess.Popen(
        [sys.executable, "-m", "instantrt.compiler.smoke.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


@contextmanager
def standby(*, needed: bool) -> Iterator[Callable[[], Child]]:
    """What gives children; where one is surely `needed` it begins now, and imports while other work is done.

    One that nobody took ends with the `with` block.
    """
    waiting = [begun()] if needed else []
    try:
        yield lambda: waiting.pop() if waiting else begun()
    finally:
        for child in waiting:
            with child:
                child.kill()


@contextmanager
def started(
    orders: Sequence[ModelOrder], feeds: Mapping[str, Array], take: Callable[[], Child] = begun
) -> Iterator[Running]:
    """The child at work, which does not outlive the `with` block."""
    seconds = SECONDS + sum(size(Path(order.model)) for order in orders) / BYTES_PER_SECOND
    with tempfile.TemporaryDirectory(prefix="smoke.") as scratch, take() as child:
        try:
            folder = Path(scratch)
            (folder / "order.json").write_text(json.dumps([asdict(order) for order in orders]), "utf-8")
            (folder / "feeds.pickle").write_bytes(pickle.dumps(feeds))
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # how it ended is said by its outcomes
                print(scratch, file=child.stdin, flush=True)
            yield Running(child, folder, len(orders), seconds, time.monotonic() + seconds)
        finally:
            child.kill()


def ended(status: int, errors: str) -> str:
    """How a process ended that gave no account."""
    if status >= 0:
        return f"its process ended with status {status}" + (f": {errors.splitlines()[-1]}" if errors else "")
    name = signal.Signals(-status).name
    why = " (the machine ran out of memory, or someone ended it)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{why}"


def size(model: Path) -> int:
    """Bytes of an ONNX file and what lies beside it."""
    return sum(path.stat().st_size for path in model.parent.iterdir() if path.is_file())
