"""For the API pages: paragraphs of docstrings that are written in columns, and drawings, stay as they are."""

from __future__ import annotations

import re
from typing import Any

import griffe

COLUMNS = re.compile(r"\S {2,}\S", re.MULTILINE)


class KeepColumns(griffe.Extension):  # type: ignore[misc]
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        paragraphs = obj.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(as_code(p) if COLUMNS.search(p) else p for p in paragraphs)


def as_code(paragraph: str) -> str:
    return "```text\n" + paragraph.strip("\n") + "\n```"
