"""`instantrt targets`."""

from __future__ import annotations

from rich.table import Table

from instantrt.compiler.target import TARGETS
from instantrt.tools.cli.console import console


def main() -> None:
    """Prints a row a target."""
    table = Table("target", "family", "also called", "artifact", "A8W8", "bf16")
    for t in TARGETS:
        kind = "ONNX Runtime" if t.sm is None else f"TensorRT {t.tensorrt}" + (", RTX" if t.rtx else "")
        table.add_row(t.name, t.family, ", ".join(t.aliases), kind, yes(t.int8_mma), yes(t.bf16))
    console.print(table)


def yes(flag: bool) -> str:
    return "yes" if flag else "no"
