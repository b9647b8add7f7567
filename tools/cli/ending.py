"""How every command ends: an error of the user prints without a traceback, and FAILED is the last word."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from instantrt.passes.core.errors import UserError

WRONG_COMMAND_LINE, INTERRUPTED = 2, 130  # the exit statuses that typer gives them
WORDS = {WRONG_COMMAND_LINE: "FAILED", INTERRUPTED: "interrupted; nothing half-written was left\nFAILED"}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Inside, an error of the user or the system prints and exits with 1.

    A wrong command line exits with 2, an interruption or a request to end (SIGTERM) with 130.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {error}\nFAILED", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code in WORDS:
            print(WORDS[stop.code], file=sys.stderr)
        raise
