"""Where the commands begin: from here on, while all else is imported too, an interruption is answered in a line."""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module
from typing import NoReturn

from instantrt.tools.cli.ending import exit_on_error


def main() -> NoReturn:
    """The command `instantrt`."""
    begin("main")


def compile_main() -> NoReturn:
    """The script `compile`, another name of `instantrt compile`."""
    begin("compile_main")


def begin(name: str) -> NoReturn:
    with exit_on_error():
        try:
            getattr(import_module("instantrt.tools.cli.app"), name)()
        except SystemExit as stop:
            if stop.code:
                raise
        atexit._run_exitfuncs()
        if sys.stdout is not None:  # closed, by `>&-`
            sys.stdout.flush()
    os._exit(0)  # else the interpreter frees all that torch is, object by object: docs/facts.md, "The end of a command"
