"""The command line, run inside of the test's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.app import app


def invoke(*words: str | Path, **environment: str) -> Any:
    """What `instantrt WORDS` did: its output, exit_code and exception."""
    return CliRunner().invoke(app, list(map(str, words)), env=environment)


def refused(*words: str | Path) -> UserError:
    error = invoke(*words).exception
    assert isinstance(error, UserError), error
    return error
