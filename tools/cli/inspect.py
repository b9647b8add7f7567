"""`instantrt inspect MODEL`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from instantrt.compiler.options import Checkpoint
from instantrt.compiler.target import Backend
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.console import Stages, console, tell
from instantrt.tools.cli.options import takes

if TYPE_CHECKING:
    from instantrt.compiler.frontend.account import Account
    from instantrt.compiler.inspect import Inspection, LayerReport

SHOWN = (
    "run: artifacts ran, and were checked. built: an engine was built, not run. compiled: written, not run. A build "
    "kit is what compile writes where no engine can be built; `instantrt build` finishes it where the GPU is."
)


@takes({Checkpoint: ""})
def main(
    model: Annotated[Path, typer.Argument(help="a checkpoint's folder, or a GGUF file")],
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    every_layer: Annotated[bool, typer.Option("--every-layer", help="a row for each layer, alike or not")] = False,
    **options: Any,
) -> None:
    """Prints what is found; a checkpoint with problems ends with exit status 1."""
    from instantrt.compiler.inspect import inspect

    with Stages() as stages:
        say = (lambda text: None) if as_json else stages.say
        say(f"reading {model}")
        found = inspect(model, say=say, **options)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, every_layer=every_layer)
    if found.problems:
        raise typer.Exit(1)


def show(found: Inspection, *, every_layer: bool) -> None:
    """Prints an inspection: the summary, the layers, the targets, and the problems last."""
    tell(f"{found.model}: {found.format}; runs as {found.runs_as}")
    if found.targets:  # else it could not be opened
        console.print(
            f"{found.tensors} tensors, {found.parameters / 1e6:,.1f} M parameters, {found.bytes / 1e6:,.1f} MB in files"
        )
        show_layers(found.layers, every_layer=every_layer)
        show_targets(found)
        show_account(found.account)
    for note in found.notes:
        tell(f"note: {note}")
    for each in found.problems:
        error = UserError(each.what, where=each.where, expected=each.expected, found=each.found, fix=each.fix)
        console.print(f"problem: {error}", soft_wrap=True)
    console.print("1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems")


def show_layers(layers: Sequence[LayerReport], *, every_layer: bool) -> None:
    """A row for all layers that differ in their number, and in the range of their parameters, alone."""
    from instantrt.compiler.quant.config import pattern_of
    from instantrt.tools.cli.show import numbers

    alike: dict[tuple[Any, ...], list[LayerReport]] = {}
    for layer in layers:
        name = layer.path if every_layer else pattern_of(layer.path)
        alike.setdefault((name, layer.shape, layer.stored, layer.sorted_inputs), []).append(layer)
    table = Table(*(Column(name, no_wrap=True) for name in ("layers", "shape")), "stored as")
    for (name, shape, stored, ordered), same in alike.items():
        zeros, scales = ([v for each in same if (v := getattr(each, part))] for part in ("zeros", "scales"))
        words = [stored]
        words += [f"zeros {min(low for low, _ in zeros)} .. {max(high for _, high in zeros)}"] if zeros else []
        words += [f"scales {min(low for low, _ in scales):.2e} .. {max(h for _, h in scales):.2e}"] if scales else []
        words += ["inputs sorted"] if ordered else []
        which = name.replace("*", numbers([each.path for each in same]))
        table.add_row(which, f"[{shape[0]}, {shape[1]}]", ", ".join(words))
    if table.row_count:
        console.print(table, highlight=False)


def show_targets(found: Inspection) -> None:
    """Prints how far each target has been shown to work, and what an artifact takes."""
    from instantrt.compiler.inspect import CACHE
    from instantrt.compiler.support import METHODS, cell
    from instantrt.compiler.target import TARGETS

    own = [m for m in METHODS if m.name == found.runs_as]
    table = Table("method", "targets", "shown so far", title="what compile can make of it", caption=SHOWN)
    for method in own or [m for m in METHODS if m.quant_method == "instant_quant"]:
        shown: dict[str, list[str]] = {}
        for target in TARGETS:
            shown.setdefault(str(cell(method, target)), []).append(target.name)
        for index, (what, names) in enumerate(shown.items()):
            table.add_row("" if index else method.name, ", ".join(names), what)
    console.print(table)
    for kind, count in found.bytes_on.items():
        cache = found.cache_bytes_per_token[kind] / 1e3
        bits = 8 * CACHE[Backend(kind)].itemsize
        tell(
            f"{kind}: about {count / 1e6:,.1f} MB of weights on disk and in memory"
            + (f", {cache:,.1f} kB of cache a token ({bits} bits)" if cache else "")
        )
    for quant, sizes in found.bytes_as.items():
        words = ", ".join(f"{count / 1e6:,.1f} MB for {kind}" for kind, count in sizes.items())
        tell(f"--quant {quant}: about {words}")


def show_account(account: Account) -> None:
    """Prints what the tensors and the files are for."""
    from instantrt.compiler.frontend.side_files import MERGED, READ

    tell(
        f"tensors: {account.parameters} used by parameters, {account.quantization} by the quantization, "
        f"{sum(entry.count for entry in account.harmless)} harmless"
    )
    for entry in account.harmless:
        tell(f"  {entry.name} ({entry.count}): {entry.why}", highlight=False)
    tell("files: " + (", ".join(e.name for e in account.files if e.why in (READ, MERGED)) or "none read"))
    for entry in account.files:
        if entry.why not in (READ, MERGED):
            tell(f"  {entry.name}: not read: {entry.why}", highlight=False)
