"""How every command ends: what the user has to mend is said without a traceback, and FAILED is the last word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from instantrt.passes.core.errors import UserError

WRONG_COMMAND_LINE = 2  # the exit status that typer makes of it, after it has said what is wrong


@contextmanager
def errors_told() -> Iterator[None]:
    """Inside, an error of the user or the system prints and exits with 1, a wrong command line with 2."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {error}\nFAILED", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == WRONG_COMMAND_LINE:
            print("FAILED", file=sys.stderr)
        raise


def run(main: Callable[..., None]) -> None:
    """Runs `main` with the command line's arguments."""
    with errors_told():
        typer.run(main)
