"""Runs ONNX files in a fresh process, and says in words how that ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from instantrt.passes.core.lazy import Array

SECONDS, BYTES_PER_SECOND = 300, 20 << 20  # a run that takes longer, for its size, hangs
LOADING = ("start", "load")  # what a process is at before its first step
Answers = dict[str, dict[str, Array]]  # step -> output -> value


@dataclass(frozen=True)
class ModelOrder:
    """An ONNX file and what to run of it: see `child`."""

    model: str
    steps: tuple[tuple[str, str], ...]
    cache: str = ""
    as_written: bool = False
    attempts: bool = False


@dataclass(frozen=True)
class Ending:
    """What became of one order.

    failed    what went wrong, `during` which step; "" where nothing did
    refused   why the last attempt that was no good was none
    """

    answers: Answers = field(default_factory=dict)
    failed: str = ""
    during: str = ""
    refused: str = ""
    peak_kb: int = 0


class Process:
    """The child, from the start on; `outcomes` waits for it. Inside `with`, so that none outlives this process."""

    def __init__(self, orders: Sequence[ModelOrder], feeds: Mapping[str, Array]) -> None:
        self.orders, self.feeds = orders, feeds
        self.seconds = SECONDS + sum(size(Path(order.model)) for order in orders) / BYTES_PER_SECOND

    def __enter__(self) -> Self:
        self.scratch = tempfile.TemporaryDirectory(prefix="smoke.")
        self.folder = Path(self.scratch.name)
        (self.folder / "order.json").write_text(json.dumps([asdict(order) for order in self.orders]), "utf-8")
        np.savez(self.folder / "feeds.npz", **self.feeds)  # type: ignore[arg-type]
        self.events = (self.folder / "events").open("w+")
        self.errors = (self.folder / "errors").open("w+", errors="replace")
        self.child = subprocess.Popen(
            [sys.executable, "-m", "instantrt.compiler.smoke.child", str(self.folder)],
            stdin=subprocess.DEVNULL,
            stdout=self.events,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self.deadline = time.monotonic() + self.seconds
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        self.events.close()
        self.errors.close()
        self.scratch.cleanup()

    def outcomes(self) -> list[Ending]:
        """One for each order."""
        how = "its process ended early"
        try:
            status = self.child.wait(max(0.0, self.deadline - time.monotonic()))
            how = ended(status, self.tail()) if status else how
        except subprocess.TimeoutExpired:
            how = f"it did not finish within {self.seconds:.0f} s"
        self.events.seek(0)
        found: list[Ending] = []
        for event in map(json.loads, self.events):
            if "order" in event:
                found.append(Ending(failed=how, during="start"))
            elif "begin" in event:
                found[-1] = replace(found[-1], during=event["begin"])
            elif "attempt" in event:
                found[-1] = replace(found[-1], during=event["attempt"], refused=event["found"])
            elif "failed" in event:
                found[-1] = replace(found[-1], failed=event["failed"])
            elif "done" in event:
                answers = self.answers(len(found) - 1)
                found[-1] = replace(
                    found[-1], answers=answers, failed="" if answers else found[-1].refused, peak_kb=event["peak_kb"]
                )
        return [*found, *[Ending(failed=how, during="start")] * (len(self.orders) - len(found))]

    def answers(self, index: int) -> Answers:
        found: Answers = {}
        with np.load(self.folder / f"{index}.npz", allow_pickle=True) as file:  # strings are objects; the child is ours
            for key, value in file.items():
                step, name = key.split("|", 1)
                found.setdefault(step, {})[name] = value
        return found

    def tail(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:].strip()


def ended(status: int, tail: str) -> str:
    """How a process ended that gave no account."""
    if status >= 0:
        return f"its process ended with status {status}" + (f": {tail.splitlines()[-1]}" if tail else "")
    name = signal.Signals(-status).name
    why = " (the machine ran out of memory, or someone ended it)" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{why}"


def size(model: Path) -> int:
    """Bytes of an ONNX file and what lies beside it."""
    return sum(path.stat().st_size for path in model.parent.iterdir() if path.is_file())
