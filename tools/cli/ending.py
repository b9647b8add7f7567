"""How every command ends: no error prints a traceback unless --debug was given, and FAILED is the last word."""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from instantrt.passes.core.errors import UserError, in_a_line

WRONG_COMMAND_LINE, INTERRUPTED = 2, 130  # the exit statuses that typer gives them
WORDS = {WRONG_COMMAND_LINE: "FAILED", INTERRUPTED: "interrupted; nothing half-written was left\nFAILED"}
BUG = "this is a bug of InstantRT: run again with --debug, and report what that shows"

MODULE = "lm_head"
IMPORT = "<frozen importlib._bootstrap>"
LATER = 0.02  # seconds, until it is looked again whether the import is over

interrupted: list[int] = []  # the signals that came
typed: ContextVar[Sequence[str]] = ContextVar("typed", default=())  # the options of this command, without dashes
debug: ContextVar[bool] = ContextVar("debug", default=False)  # show the traceback of whatever ends the command


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Inside, any error prints and exits with 1: one of the user or the system, or else a bug of ours, which says so.

    A wrong command line exits with 2; with 130 an interruption, a request to end (SIGTERM), and a terminal that is gone
    (SIGHUP), but for who asked not to hear of that: nohup.
    """
    interrupted.clear()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)
    debug.set(False)
    try:
        yield
    except SystemExit as stop:
        if stop.code in WORDS:
            print(WORDS[stop.code], file=sys.stderr)
        raise
    except BaseException as error:
        if debug.get():
            traceback.print_exc()
        if interrupted or not isinstance(error, Exception):  # C code may make another error of it
            print(WORDS[INTERRUPTED], file=sys.stderr)
            sys.exit(INTERRUPTED)
        print(f"error: {said(error)}\nFAILED", file=sys.stderr)
        sys.exit(1)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, the first time not inside of an import: C code there prints a traceback of its own."""
    if number != signal.SIGALRM:
        interrupted.append(number)
    if len(interrupted) == 1 and importing(frame):
        signal.setitimer(signal.ITIMER_REAL, LATER)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0)  # else it rings when nobody listens any more
        raise KeyboardInterrupt


def importing(frame: FrameType | None) -> bool:
    """Is a module being imported, where `frame` is?"""
    while frame is not None and frame.f_code.co_filename != IMPORT:
        frame = frame.f_back
    return frame is not None


def said(error: Exception) -> Exception:
    """What is printed of it: one of the user or the system says all there is to say."""
    match error:
        case UserError() | OSError():
            return error
        case MemoryError():
            return UserError("there is not enough memory", found=str(error))
        case _:
            return UserError(f"internal error: {in_a_line(error)}", fix=BUG)


def say_as_typed(error: UserError, options: Iterable[str]) -> None:
    """Rewords all that an error says."""
    error.reword(lambda text: as_typed(text, options))


def as_typed(text: str, options: Iterable[str]) -> str:
    """`--max-length` in an error or a note for who typed that, where Python says `max_length`.

    Those that were not typed stay: a checkpoint's config has a group_size, too. A name that is a word of English, or
    of a module, is the option where a field begins with it, or with another and it.
    """
    for option in options:
        name = option.replace("-", "_")
        plain = "_" in name and name != MODULE
        pattern = rf"(?<![\w./'-])()({name})(?![\w./'-])" if plain else rf"^((?:\S+ and )?)({name})(?=[ :])"
        text = re.sub(pattern, rf"\1--{option}", text)
    return text
