"""What the command line shows: tables that fit a terminal, progress with rates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from compiler.backend.writer import Progress as Report
from compiler.build import Plan
from compiler.request import Request
from compiler.target import TARGETS
from passes.quant import QuantTensor

console = Console()


@contextmanager
def writing(total: int) -> Iterator[Report]:
    """A bar of the bytes written, with rate and time left."""
    columns = (
        TextColumn("{task.description:<36.36}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda name, size: bar.update(task, advance=size, description=name)


def show_targets() -> None:
    table = Table("target", "family", "also called", "artifact", "A8W8", "bf16")
    for t in TARGETS:
        kind = "ONNX Runtime" if t.sm is None else f"TensorRT {t.tensorrt}" + (", RTX" if t.rtx else "")
        table.add_row(t.name, t.family, ", ".join(t.aliases), kind, yes(t.int8_mma), yes(t.bf16))
    console.print(table)


def yes(flag: bool) -> str:
    return "yes" if flag else "no"


def show_explanation(planned: Plan) -> None:
    """One line a linear: what it was quantized to and lowered to, or why it was left float; then other refusals."""
    lowered: dict[str, list[str]] = {}
    for entry in planned.ledger.entries:
        if entry.rewrite.startswith("Lower") and entry.done:
            lowered.setdefault(entry.node, []).append(entry.done.partition(" -> ")[2])
    table = Table("layer", "quantized to", "runs as, or why it stays float", title="linear layers")
    for path, decision in planned.decisions.items():
        if isinstance(decision, QuantTensor):
            table.add_row(path, str(decision), " | ".join(dict.fromkeys(lowered.get(path, []))))
        else:
            table.add_row(path, "float", decision.reason)
    console.print(table)
    show_orders(planned)
    linears = set(planned.decisions) | set(lowered)
    rejected = (e for e in planned.ledger.rejected() if e.node not in linears and e.rewrite != "FoldOrder")
    others = Counter((e.rewrite, e.reason) for e in rejected)
    if others:
        rest = Table("pass", "nodes", "why it left them", title="other passes")
        for (rewrite, reason), count in others.items():
            rest.add_row(rewrite, str(count), reason)
        console.print(rest)


def show_orders(planned: Plan) -> None:
    """What became of each input order: folded into the layers before, or one Gather for all that share it."""
    sharing: dict[str, list[str]] = {}
    for entry in planned.ledger.applied("SortInputs"):
        sharing.setdefault(entry.done, []).append(entry.node)
    table = Table("layers whose inputs are sorted", "how", title="activation order")
    for entry in planned.ledger.entries:
        if entry.rewrite == "FoldOrder" and entry.node in sharing:
            table.add_row("\n".join(sharing[entry.node]), entry.done or f"one Gather: {entry.reason}")
    if table.row_count:
        console.print(table)


def show_plan(request: Request, planned: Plan) -> None:
    """What a compilation would write and need."""
    quantized = [q for q in planned.decisions.values() if isinstance(q, QuantTensor)]
    summary = Counter(str(q) for q in quantized)
    table = Table("target", "layers", "quantized to", "weights on disk", title=f"plan for {request.model}")
    for target in planned.lowered:
        kinds = "\n".join(f"{count} x {kind}" for kind, count in summary.items()) or "nothing, stays float"
        table.add_row(target, str(len(quantized)), kinds, f"{planned.size(target) / 1e6:,.1f} MB")
    console.print(table)
    console.print("Memory to compile: below 1.5 GB whatever the model's size; nothing was written.")
