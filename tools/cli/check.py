"""`instantrt check DIR`."""

from __future__ import annotations

from instantrt.tools.cli.options import Folder


def main(folder: Folder) -> None:
    """Prints a line for each artifact that is sound."""
    from instantrt.compiler.check import check
    from instantrt.tools.cli.console import console

    for line in check(folder):
        console.print(line, soft_wrap=True)
    console.print("PASSED")
