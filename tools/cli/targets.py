"""`instantrt targets`."""

from __future__ import annotations

from rich.table import Table

from instantrt.compiler.target import TARGETS
from instantrt.tools.cli.console import console


def main() -> None:
    """Prints a row a target."""
    columns = ("target", "family", "also called", "artifact", "RTX", "A8W8", "bf16")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))  # fits 80 columns
    for t in TARGETS:
        kind = "ONNX Runtime" if t.sm is None else f"TensorRT {t.tensorrt}"
        table.add_row(t.name, t.family, ", ".join(t.aliases), kind, yes(t.rtx), yes(t.int8_mma), yes(t.bf16))
    console.print(table)


def yes(flag: bool) -> str:
    return "yes" if flag else "no"
