"""All rows, and the table of them in docs/odd-inputs.md: `python -m tests.corpus.table` prints it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import get_args

from tests.corpus.row import Kind, Row

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("rows_of_*.py"))
ROWS: tuple[Row, ...] = tuple(chain.from_iterable(import_module(f"tests.corpus.{name}").ROWS for name in MODULES))


def markdown() -> str:
    """The rows by kind: what the input is, and what comes of it."""
    rows = sorted(ROWS, key=lambda row: get_args(Kind).index(row.kind))
    lines = (line((row.what, row.kind, f"refused: {row.refused}" if row.refused else "right")) for row in rows)
    return "\n".join([line(("input", "kind", "what comes of it")), "|---|---|---|", *lines])


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown())
