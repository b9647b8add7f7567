"""What a compilation shows: the plan, what became of each layer and why, the artifacts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.backend.tensorrt.choose import expanded
from instantrt.compiler.compile import REPORT
from instantrt.compiler.plan import Plan
from instantrt.compiler.quant.config import pattern_of
from instantrt.compiler.request import Request
from instantrt.compiler.watch import Watch
from instantrt.passes.core.lazy import view_of
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Lowering
from instantrt.passes.qdq.fold_order import FoldOrder
from instantrt.passes.qdq.join_linears import parts_of
from instantrt.passes.qdq.sort_inputs import SortInputs
from instantrt.tools.cli.console import Stages, console, tell
from instantrt.tools.cli.ending import as_typed, typed

if TYPE_CHECKING:
    from instantrt.compiler.accuracy.verify import Verdict
    from instantrt.compiler.serving.config import Served
    from instantrt.compiler.smoke.ran import Ran

# Measured: benchmarks/compile.md, and benchmarks/engine_*.json with TensorRT-RTX.
WRITING, BUILDING = "below 1.5 GB whatever the model's size", "2 to 3 times the engine's weights, and 0.5 GB"


class ConsoleWatch(Watch):
    """A compilation on the terminal: its stages, what was planned, then what came out."""

    def __init__(self, request: Request, triton: Path | None, stages: Stages, *, explain: bool) -> None:
        self.request, self.triton, self.stages, self.explain = request, triton, stages, explain
        self.weights = 0  # of the model
        self.kept: list[Callable[[], None]] = []  # what is printed at the end

    def say(self, text: str) -> None:
        self.stages.say(text)

    def planned(self, plan: Plan) -> None:
        constants = map(view_of, plan.model.graph.tensors().values())
        self.weights = sum(math.prod(view.shape) for view in constants if view is not None)
        show_notes(plan)
        if self.explain:
            show_explanation(plan)

    def writing(self, total: int) -> None:
        self.stages.begin(f"writing {total / 1e6:,.1f} MB", total, self.weights)

    def progress(self, name: str, size: int) -> None:
        self.stages.progress(name, size)

    def served(self, served: Sequence[Served]) -> None:
        for each in served:
            line = f"{self.triton}  {', '.join(each.models) or 'none: ' + each.reasons}"
            if each.models and each.no_text:
                line += f"; no model that takes text: {each.no_text}"
            self.kept.append(partial(console.print, line, soft_wrap=True))

    def ran(self, ran: Ran) -> None:
        self.kept.append(partial(tell, str(ran)))

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        from instantrt.tools.cli.show_accuracy import show_verdict

        self.kept += [partial(show_verdict, verdict, self.request.out / REPORT) for verdict in verdicts]

    def finished(self, artifacts: list[Artifact]) -> None:
        """What is there now."""
        self.stages.end()
        show_artifacts(self.request.out, artifacts, every_weight=self.explain)
        for show in self.kept:
            show()


def show_explanation(planned: Plan) -> None:
    """For each linear what it was quantized to and runs as, or why it was left float; then other refusals."""
    sharing = targets_by_graph(planned)
    forms: dict[tuple[str, str], dict[str, None]] = {}
    for entry in (e for e in planned.log.entries if isinstance(e.by, Lowering) and e.done):
        parts = parts_of(entry.node)
        for path in parts:
            joined = [p for p in parts if p != path]
            form = entry.done + (f", with {short(joined)}" if joined else "")
            forms.setdefault((entry.target, path), {})[form] = None
    became: dict[str, dict[str, list[str]]] = {}  # layer -> what it became -> targets
    for first, targets in sharing.items():
        for path, decision in planned.twins[first].decisions.items():
            if isinstance(decision, QuantTensor):
                what = f"{decision}: {' | '.join(forms.get((first, path), ()))}"
            else:
                what = f"float: {decision.reason}"
            became.setdefault(path, {}).setdefault(what, []).extend(targets)
    same: dict[tuple[str, str], list[str]] = {}
    for path, found in became.items():
        lines = found if len(found) == 1 else (f"{', '.join(targets)}: {what}" for what, targets in found.items())
        same.setdefault((pattern_of(path), "\n".join(lines)), []).append(path)
    layers = Column("layers", no_wrap=True)  # a name cut short says nothing
    table = Table(layers, "quantized to, and what runs it; or why it stays float", title="linear layers")
    for (layer, text), paths in same.items():
        table.add_row(layer.replace("*", numbers(paths)), text)
    console.print(table)
    show_orders(planned)
    linears = set(became).union(path for _, path in forms)
    # Of a linear, joined with others or not, the table above says all: that one form did not fit is no news.
    rejected = (e for e in planned.log.rejected() if not linears.intersection(parts_of(e.node)))
    rejected = (e for e in rejected if not isinstance(e.by, FoldOrder))
    others = Counter((type(e.by).__name__, ", ".join(sharing.get(e.target, ())), e.reason, e.costs) for e in rejected)
    if others:
        rest = Table("pass", "for", "nodes", "why it left them; what that costs", title="other passes")
        for (rewrite, names, reason, costs), count in others.items():
            rest.add_row(rewrite, names or "all", str(count), "\n".join(filter(None, (reason, costs))))
        console.print(rest)


def targets_by_graph(planned: Plan) -> dict[str, list[str]]:
    """The first target of each lowered graph -> all that share it."""
    graphs: dict[int, list[str]] = {}
    for target, graph in planned.lowered.items():
        graphs.setdefault(id(graph), []).append(target)
    return {names[0]: names for names in graphs.values()}


def short(paths: list[str]) -> str:
    """a.b.k_proj, a.b.v_proj -> k_proj and v_proj."""
    return " and ".join(path.rpartition(".")[2] for path in paths)


def numbers(paths: list[str]) -> str:
    """The layers that share a pattern: `{0-3,7}`, or the number alone."""
    found = sorted(int(m[1]) for path in paths if (m := re.search(r"\.(\d+)\.", path)))
    if len(found) < 2:
        return "".join(map(str, found))
    starts = [n for n in found if n - 1 not in found]
    ends = [n for n in found if n + 1 not in found]
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) + "}"


def show_orders(planned: Plan) -> None:
    """What became of each input order: folded into the layers before, or one Gather for all that share it."""
    sharing: dict[str, list[str]] = {}
    for entry in planned.log.applied(SortInputs):
        sharing.setdefault(entry.done, []).append(entry.node)
    table = Table("layers whose inputs are sorted", "how", title="activation order")
    for entry in planned.log.entries:
        if isinstance(entry.by, FoldOrder) and entry.node in sharing:
            table.add_row("\n".join(sharing[entry.node]), entry.done or f"one Gather: {entry.reason}")
    if table.row_count:
        console.print(table)


def show_engine(target: str, engine: Mapping[str, Any], *, every_weight: bool) -> None:
    """How an engine reads its quantized weights: a warning where it expands some, a table of all where asked for."""
    slow = expanded(engine)
    if slow:
        are = "is" if len(slow) == 1 else "are"
        tell(
            f"note: {target}: {len(slow)} of {len(engine['weights'])} quantized weights {are} written out as float on "
            f"every run ({slow[0]}, say), which is no faster than float weights"
        )
    if every_weight:
        same: dict[tuple[str, str], list[str]] = {}
        for linear, read in engine["weights"].items():
            same.setdefault((pattern_of(linear), read), []).append(linear)
        layers = Column("layers", no_wrap=True)
        table = Table(layers, f"how {target} reads their weights", title="engine")
        for (layer, read), paths in same.items():
            table.add_row(layer.replace("*", numbers(paths)), read)
        console.print(table)


def show_plan(request: Request, planned: Plan) -> None:
    """What a compilation would write and need."""
    table = Table("target", "layers", "quantized to", "weights on disk", title=f"plan for {request.model}")
    for target in planned.lowered:
        quantized = planned.twins[target].quantized.values()
        summary = Counter(str(q) for q in quantized)
        kinds = "\n".join(f"{count} x {kind}" for kind, count in summary.items()) or "nothing, stays float"
        table.add_row(target, str(len(quantized)), kinds, f"{planned.size(target) / 1e6:,.1f} MB")
    console.print(table)
    built = [name for name, choice in planned.builders.items() if choice.flavour is not None]
    for what, names in ((WRITING, [t for t in planned.lowered if t not in built]), (BUILDING, built)):
        if names:
            console.print(f"Memory for {', '.join(names)}: {what}.")
    passes = f", and the passes are in {request.dump_passes}" if request.dump_passes is not None else ""
    console.print(f"Nothing was written{passes}.", soft_wrap=True)


def show_notes(planned: Plan) -> None:
    """What the user should know before anything is written: notes, and the layers that an accuracy budget raised."""
    for note in planned.notes:
        tell(f"note: {as_typed(note, typed.get())}")
    for twin in planned.each_twin:
        if twin.raised is not None:
            from instantrt.tools.cli.show_accuracy import show_raised

            show_raised(twin.raised, ", ".join(name for name, t in planned.twins.items() if t is twin))


def show_artifacts(out: Path, artifacts: list[Artifact], *, every_weight: bool) -> None:
    """Every artifact with its size; of an engine, what the builder made of its weights."""
    for artifact in artifacts:
        size = sum((out / f).stat().st_size for f in artifact.digests)
        console.print(f"{out / artifact.path}  {size / 1e6:,.1f} MB", soft_wrap=True)
        if artifact.engine is not None:
            show_engine(artifact.target, artifact.engine, every_weight=every_weight)
