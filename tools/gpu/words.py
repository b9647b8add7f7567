"""A module's docstring as --help shows it: in the terminal's width, of the standard library alone."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap


def parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Of a program that its module's docstring describes."""
    return argparse.ArgumentParser(
        prog, description=described(doc), formatter_class=argparse.RawDescriptionHelpFormatter
    )


def described(doc: str | None, width: int | None = None) -> str:
    """Paragraphs are filled; an indented line stays one, and goes on under its text where it is too long."""
    width = width or shutil.get_terminal_size().columns
    return "\n\n".join(paragraph(each, width) for each in (doc or "").strip().split("\n\n"))


def paragraph(text: str, width: int) -> str:
    if not text.startswith(" "):
        return textwrap.fill(text.replace("\n", " "), width, break_on_hyphens=False)
    return "\n".join(item(line, width) for line in text.splitlines())


def item(line: str, width: int) -> str:
    """`    name      what it does`."""
    head = re.match(r" *(\S+ {2,})?", line)
    assert head is not None
    indent = " " * (len(head[0]) if head[1] else len(head[0]) + 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
