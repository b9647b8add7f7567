"""How every tool runs, and ends as the compiler does."""

from __future__ import annotations

from collections.abc import Callable

import typer

from compiler.ending import errors_told


def run(main: Callable[..., None]) -> None:
    """Runs `main` with the command line's arguments."""
    with errors_told():
        typer.run(main)
