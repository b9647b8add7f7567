"""Runs a function in a copy of this process: whatever it changes there, nothing is changed here."""

from __future__ import annotations

import os
import pickle
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

SECONDS = 300  # a copy that takes so much longer than this process hangs: a thread of this process may have held a lock
T = TypeVar("T")
U = TypeVar("U")


def apart(work: Callable[[], T], meanwhile: Callable[[], U]) -> tuple[T, U]:
    """What `work` gives or raises, in a copy of this process, and `meanwhile` in this one.

    EOFError if the copy ends without a word, TimeoutError if it does not end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException), open(writer, "wb") as file:
            pickle.dump(outcome(work), file)
        os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as file:
            here = meanwhile()
            if not select.select([file], [], [], SECONDS)[0]:
                raise TimeoutError
            given, error = pickle.load(file)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if error is not None:
        raise error
    return given, here


def outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error
