"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def head(*titles: str) -> list[str]:
    return [row(*titles), "|" + "---|" * len(titles)]


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table that has such rows of cells."""
    return [*head(*titles), *(row(*cells) for cells in rows)]
