"""How every tool ends: an error of the user or the system prints without a traceback and exits with 1."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from passes.errors import UserError


def run(main: Callable[..., None]) -> None:
    """Runs `main` with the command line's arguments."""
    try:
        typer.run(main)
    except (UserError, OSError) as error:
        print(f"error: {error}\nFAILED", file=sys.stderr)
        sys.exit(1)
