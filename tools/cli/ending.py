"""How every command ends: no error prints a traceback unless --debug was given, and FAILED is the last word."""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from instantrt.passes.core.errors import UserError, in_a_line

WRONG_COMMAND_LINE, INTERRUPTED = 2, 130  # the exit statuses that typer gives them
WORDS = {WRONG_COMMAND_LINE: "FAILED", INTERRUPTED: "interrupted; nothing half-written was left\nFAILED"}
BUG = "this is a bug of InstantRT: run again with --debug, and report what that shows"

debug: ContextVar[bool] = ContextVar("debug", default=False)  # show the traceback of whatever ends the command


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Inside, any error prints and exits with 1: one of the user or the system, or else a bug of ours, which says so.

    A wrong command line exits with 2, an interruption or a request to end (SIGTERM) with 130.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    debug.set(False)
    try:
        yield
    except Exception as error:
        if debug.get():
            traceback.print_exc()
        print(f"error: {said(error)}\nFAILED", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code in WORDS:
            print(WORDS[stop.code], file=sys.stderr)
        raise


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
    """`--max-length` in an error for who typed that, where Python says `max_length`.

    Those that were not typed stay: a checkpoint's config has a group_size, too. A name that is a word of English is the
    option where a field begins with it, or with another and it.
    """
    for option in options:
        name = option.replace("-", "_")
        pattern = rf"(?<![\w./-])()({name})(?![\w./-])" if "_" in name else rf"^((?:\S+ and )?)({name})(?= )"
        error.reword(partial(re.sub, pattern, rf"\1--{option}"))
