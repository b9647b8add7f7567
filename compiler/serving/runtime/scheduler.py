"""Continuous batching: sequences join the running batch between decode steps and leave it when they are done.

        waiting --> joining --> running[0 .. n-1] --> finished, cancelled or failed
                    one at a time, prefilled       |
                    in row n, in chunks            one decode step for all of them

A long prompt is prefilled chunk by chunk between decode steps, so that it delays nobody for long; but whole where its
tokens see those after them.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .sampling import Sampler, Sampling
from .text import Detokenizer, Text

Array = npt.NDArray[Any]
UNLOADED = "the model is being unloaded"
CHUNK = 256  # prompt tokens between two decode steps


class Engine(Protocol):
    """What runs the model; `close` frees all that it holds."""

    def prefill(self, row: int, ids: Array, done: int) -> Array: ...
    def decode(self, ids: Array, done: Array) -> Array: ...
    def move(self, source: int, target: int, length: int) -> None: ...
    def close(self) -> None: ...


class Failure(Enum):
    """Why a request has no reply."""

    INVALID = "invalid"
    BUSY = "busy"
    CLOSING = "closing"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


class Reply(Protocol):
    """Where the text of a request goes."""

    def piece(self, text: str, tokens: list[int], finish: str) -> None:
        """`finish` is empty until the last piece: then stop or length."""

    def fail(self, failure: Failure, message: str) -> None: ...
    def cancelled(self) -> bool: ...


class RefusedError(Exception):
    """The request breaks a limit of the server; the message says which."""

    def __init__(self, message: str, failure: Failure = Failure.INVALID) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True)
class SequenceLimits:
    """rows: sequences that run together; length: tokens of one, prompt included; queue: requests that wait.

    whole: a prompt is run in one piece, because its tokens see one another.
    """

    rows: int = 16
    length: int = 4096
    queue: int = 1024
    whole: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "length", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, found {getattr(self, name)}")


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop_words: tuple[str, ...] = ()


@dataclass(eq=False)
class Sequence:
    """A job on its way: `done` of its tokens are in the cache, `token` is the newest, not in the cache yet."""

    job: Job
    reply: Reply
    sampler: Sampler
    detokenizer: Detokenizer
    done: int = 0
    token: int = -1
    generated: int = 0
    unsent: list[int] = field(default_factory=list)


class Scheduler:
    """Owns the engine; its thread is the only one that touches it."""

    def __init__(self, engine: Engine, text: Text, limits: SequenceLimits) -> None:
        self.engine, self.text, self.limits = engine, text, limits
        self.end_tokens = sorted(text.end_tokens)
        self.waiting: deque[Sequence] = deque()
        self.joining: Sequence | None = None
        self.running: list[Sequence] = []
        self.changed = threading.Condition()
        self.closed = self.finishing = False
        self.thread = threading.Thread(target=self.loop, name="decode", daemon=True)
        self.thread.start()
        atexit.register(self.close)  # a thread inside the model when the interpreter ends would abort the process

    def submit(self, job: Job, reply: Reply) -> None:
        """Takes a job, or raises RefusedError. Everything else about it goes to `reply`, from another thread."""
        length, limit = len(job.prompt), self.limits.length
        if length == 0:
            raise RefusedError("the prompt is empty")
        if job.max_tokens < 1:
            raise RefusedError(f"max_tokens: expected 1 or more, found {job.max_tokens}")
        if length + job.max_tokens > limit:
            raise RefusedError(
                f"the request is too long: {length} prompt tokens + max_tokens {job.max_tokens} exceed {limit}"
            )
        sampler = Sampler(job.sampling, job.prompt)
        sequence = Sequence(job, reply, sampler, Detokenizer(self.text.tokenizer, job.stop_words))
        with self.changed:
            if self.closed:
                raise RefusedError(UNLOADED, Failure.CLOSING)
            if len(self.waiting) >= self.limits.queue:
                full = f"the queue is full: {self.limits.queue} requests wait already; try again later"
                raise RefusedError(full, Failure.BUSY)
            self.waiting.append(sequence)
            self.changed.notify()

    def close(self, *, finish: bool = False) -> None:
        """Takes no more; stops after the step in progress, and whoever is unfinished is told, or when all is done."""
        with self.changed:
            self.closed, self.finishing = True, finish
            self.changed.notify()
        self.thread.join()
        atexit.unregister(self.close)

    def loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.busy())
                if self.closed and not (self.finishing and self.busy()):
                    break
            try:
                self.drop_cancelled()
                self.join()
                self.decode()
            except Exception as error:  # a failing step ends its requests, not the server
                self.fail(Failure.INTERNAL, internal(error), self.in_rows())
                self.joining, self.running = None, []
        self.fail(Failure.CLOSING, UNLOADED, [*self.in_rows(), *self.waiting])

    def busy(self) -> bool:
        return bool(self.waiting or self.joining or self.running)

    def in_rows(self) -> list[Sequence]:
        return [*self.running, *([self.joining] if self.joining else [])]

    def fail(self, failure: Failure, message: str, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            sequence.reply.fail(failure, message)

    def drop_cancelled(self) -> None:
        with self.changed:
            gone = {s for s in (*self.in_rows(), *self.waiting) if s.reply.cancelled()}
            self.waiting = deque(s for s in self.waiting if s not in gone)
        self.fail(Failure.CANCELLED, "cancelled", gone)
        if self.joining in gone:
            self.joining = None
        for row in reversed(range(len(self.running))):
            if self.running[row] in gone:
                self.leave(row)

    def join(self) -> None:
        """Prefills up to CHUNK prompt tokens of those who wait, or whole prompts, as far as there are rows."""
        budget = CHUNK
        while budget > 0 and (joining := self.next_joining()) is not None:
            prompt = joining.job.prompt[joining.done : None if self.limits.whole else joining.done + budget]
            row = len(self.running)
            logits = self.engine.prefill(row, np.array(prompt, np.int64), joining.done)
            joining.done += len(prompt)
            budget -= len(prompt)
            if joining.done == len(joining.job.prompt):
                self.joining = None
                self.running.append(joining)
                self.advance(row, logits)

    def next_joining(self) -> Sequence | None:
        with self.changed:
            if self.joining is None and self.waiting and len(self.running) < self.limits.rows:
                self.joining = self.waiting.popleft()
        return self.joining

    def decode(self) -> None:
        """One more token for every running sequence."""
        if not self.running:
            return
        ids = np.array([s.token for s in self.running], np.int64)
        logits = self.engine.decode(ids, np.array([s.done for s in self.running], np.int64))
        for sequence in self.running:
            sequence.done += 1
        for row in reversed(range(len(self.running))):  # from the end: a row that leaves is filled with the last one
            self.advance(row, logits[row])

    def advance(self, row: int, logits: Array) -> None:
        """Chooses the next token of `row`, sends what text it makes, and lets the sequence go where it ends."""
        sequence = self.running[row]
        try:
            ended = self.extend(sequence, logits)
        except Exception as error:  # of this sequence alone: the others go on
            self.fail(Failure.INTERNAL, internal(error), [sequence])
            ended = True
        if ended:
            self.leave(row)

    def extend(self, sequence: Sequence, logits: Array) -> bool:
        """Gives `sequence` its next token; was that its last?"""
        if sequence.generated < sequence.job.min_tokens:
            logits[self.end_tokens] = -np.inf
        token = sequence.sampler.choose(logits)
        if token in self.end_tokens:
            sequence.reply.piece(sequence.detokenizer.finish(), sequence.unsent, "stop")
            return True
        sequence.token = token
        sequence.generated += 1
        sequence.unsent.append(token)
        piece, finish = sequence.detokenizer.add(token), ""
        if sequence.detokenizer.stopped:
            finish = "stop"
        elif sequence.generated == sequence.job.max_tokens:
            piece, finish = piece + sequence.detokenizer.finish(), "length"
        if piece or finish:
            sequence.reply.piece(piece, sequence.unsent, finish)
            sequence.unsent = []
        return bool(finish)

    def leave(self, row: int) -> None:
        """Frees `row`: the last running sequence moves there, and the one that is joining follows."""
        last = len(self.running) - 1
        if row != last:
            self.engine.move(last, row, self.running[last].done)
            self.running[row] = self.running[last]
        self.running.pop()
        if self.joining is not None:
            self.engine.move(last + 1, last, self.joining.done)


def internal(error: Exception) -> str:
    return f"internal error: {type(error).__name__}: {error}"
