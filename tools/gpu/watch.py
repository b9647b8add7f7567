"""Runs cases in child processes that may hang or crash: that costs the one case, by name, and a few seconds.

A child is given the names of the cases it has still to do and prints JSON lines, one before and one after each:

    {"start": NAME}      {"end": NAME, "outcome": OUTCOME, "message": "...", "data": anything}

Whatever else it prints is kept only to explain its death. When it goes silent for too long it is killed; the case that
it was in is called hung, and a new child gets the rest. The same holds for a child that dies.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from instantrt.tools.places import ROOT

LAST_LINES = 25  # of a child that died
BAD = ("hung", "crashed", "failed", "not run")


@dataclass(frozen=True)
class Outcome:
    name: str
    outcome: str  # passed | failed | skipped | crashed, as the child said; hung | crashed | not run, as seen from here
    message: str = ""
    seconds: float = 0.0
    data: Any = None


@dataclass
class ChildJob:
    """Cases for one child after another. `stall` is how many seconds a child may say nothing.

    After `lives` children that were lost the rest is not run: what has taken them would take more.
    """

    command: Callable[[Sequence[str]], list[str]]
    cases: Sequence[str]
    stall: float
    environment: Mapping[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # every line that was no event and starts with KEEP
    status: int = 0  # of the first child that ended badly by itself
    lives: int = 3
    tell: Callable[[Outcome], None] = lambda outcome: None  # what is called with each outcome as it comes

    KEEP = "========="  # how compute-sanitizer marks its lines

    def left(self) -> list[str]:
        return [case for case in self.cases if case not in self.outcomes]

    def run(self, deadline: float) -> ChildJob:
        """Runs children until every case has an outcome or `deadline`, a time.monotonic(), has passed."""
        while (left := self.left()) and self.lives and time.monotonic() < deadline:
            self._child(left, deadline)
        why = "the stage's time was up" if self.lives else "too many of its neighbours were lost"
        for case in self.left():
            self.outcomes[case] = Outcome(case, "not run", why)
        return self

    def _child(self, left: Sequence[str], deadline: float) -> None:
        child = subprocess.Popen(
            self.command(left),
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=read, args=(child, lines), daemon=True)
        reader.start()
        last: deque[str] = deque(maxlen=LAST_LINES)
        now, began, ended = "", time.monotonic(), ""
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(self.stall, deadline - time.monotonic())))
            except queue.Empty:
                ended = "hung" if time.monotonic() < deadline else "not run"
                break
            if line is None:
                break
            event = parse(line)
            if event is None:
                last += [line.rstrip()] if line.strip() else []
                self.said += [line.rstrip()] if line.startswith(self.KEEP) else []
            elif "start" in event:
                now, began = event["start"], time.monotonic()
            elif "end" in event:
                name, now = event.pop("end"), ""
                self.lives -= event["outcome"] == "crashed"
                self.outcomes[name] = Outcome(name, seconds=round(time.monotonic() - began, 3), **event)
                self.tell(self.outcomes[name])
        kill(child, 0 if ended else 5)
        if not ended and child.returncode:
            self.status = self.status or child.returncode
        self._blame(now, left, ended, "\n".join(last), child.returncode)

    def _blame(self, now: str, left: Sequence[str], ended: str, last: str, status: int | None) -> None:
        """The child is gone: what became of the case that it was in, or of all if it never got to one."""
        words = {
            "hung": f"no sign of life for {self.stall:g} s",
            "not run": "the stage's time was up in it",
            "": f"its process ended with status {status}",
        }[ended]
        message = f"{words}\n{last}".strip()
        self.lives -= bool(now)
        if now and now not in self.outcomes:
            self.outcomes[now] = Outcome(now, ended or "crashed", message)
        elif not any(case in self.outcomes for case in left):  # no case is to blame
            self.outcomes.update(
                {case: Outcome(case, "not run", f"its process never came to it: {message}") for case in left}
            )


def run_all(jobs: Iterable[ChildJob], seconds: float, workers: int) -> list[Outcome]:
    """Several jobs at a time, for at most so many seconds together; the outcomes of all their cases."""
    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda job: job.run(deadline), jobs))
    return [outcome for job in done for outcome in job.outcomes.values()]


def read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def parse(line: str) -> dict[str, Any] | None:
    """An event, or None: a child's libraries print what they like."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and event.keys() & {"start", "end", "collected"} else None


def kill(child: subprocess.Popen[str], patience: float) -> None:
    """Ends it and all it started. One that ended by itself gets time to say its own status."""
    try:
        child.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may hold on to a process whose kernel never ends
            child.wait(20)


def emit(**event: Any) -> None:
    """One event of a child."""
    print("\n" + json.dumps(event), flush=True)


def failures(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """What did not pass, by name; the worst words first."""
    bad = sorted((o for o in outcomes if o.outcome in BAD), key=lambda o: BAD.index(o.outcome))
    words = {o.name: f"{o.outcome}: {o.message}" for o in bad}
    return {name: text if len(text) < 800 else f"{text[:200]} ... {text[-600:]}" for name, text in words.items()}
