"""How every tool ends: a user's error prints without a traceback and exits with 1, a wrong command line with 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from passes.errors import UserError


def run(main: Callable[..., None]) -> None:
    """Runs `main` with the command line's arguments."""
    try:
        typer.run(main)
    except UserError as error:
        print(f"error: {error}\nFAILED", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 2:  # typer has said what is wrong with the command line
            print("FAILED", file=sys.stderr)
        raise
