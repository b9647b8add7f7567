"""`instantrt inspect MODEL`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from instantrt.compiler.options import Checkpoint
from instantrt.compiler.target import Backend
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.console import Stages, console
from instantrt.tools.cli.options import takes

if TYPE_CHECKING:
    from instantrt.compiler.frontend.account import Account
    from instantrt.compiler.inspect import Inspection


@takes({Checkpoint: ""})
def main(
    model: Annotated[Path, typer.Argument(help="a checkpoint's folder, or a GGUF file")],
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
    **options: Any,
) -> None:
    """Prints what is found; a checkpoint with problems ends with exit status 1."""
    from instantrt.compiler.inspect import inspect

    with Stages() as stages:
        if not as_json:
            stages.begin(f"reading {model}")
        found = inspect(model, **options)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found)
    if found.problems:
        raise typer.Exit(1)


def show(found: Inspection) -> None:
    """Prints an inspection: the summary, the layers, the targets, and the problems last."""
    console.print(f"{found.model}: {found.format}; runs as {found.runs_as}")
    console.print(
        f"{found.tensors} tensors, {found.parameters / 1e6:,.1f} M parameters, {found.bytes / 1e6:,.1f} MB in files"
    )
    width = max((len(layer.path) for layer in found.layers), default=0)
    for layer in found.layers:
        zeros = "" if layer.zeros is None else f", zeros {layer.zeros[0]} .. {layer.zeros[1]}"
        scales = "" if layer.scales is None else f", scales {layer.scales[0]:.2e} .. {layer.scales[1]:.2e}"
        order = ", inputs sorted" if layer.sorted_inputs else ""
        shape = f"[{layer.shape[0]}, {layer.shape[1]}]"
        line = f"  {layer.path:<{width}} {shape:<14} {layer.stored}{zeros}{scales}{order}"
        console.print(line, highlight=False, soft_wrap=True)
    if found.targets:
        show_targets(found)
    show_account(found.account)
    for note in found.notes:
        console.print(f"note: {note}")
    for each in found.problems:
        error = UserError(each.what, where=each.where, expected=each.expected, found=each.found, fix=each.fix)
        console.print(f"problem: {error}", soft_wrap=True)
    console.print(f"{len(found.problems)} problems")


def show_targets(found: Inspection) -> None:
    """Prints what each target would do, and what an artifact takes."""
    from instantrt.compiler.inspect import CACHE

    targets = Table("target", "would", title="targets")
    for name, would in found.targets.items():
        targets.add_row(name, would)
    console.print(targets)
    for kind, count in found.bytes_on.items():
        cache = found.cache_bytes_per_token[kind] / 1e3
        bits = 8 * CACHE[Backend(kind)].itemsize
        console.print(
            f"{kind}: about {count / 1e6:,.1f} MB of weights on disk and in memory"
            + (f", {cache:,.1f} kB of cache a token ({bits} bits)" if cache else ""),
            soft_wrap=True,
        )
    for quant, sizes in found.bytes_as.items():
        words = ", ".join(f"{count / 1e6:,.1f} MB for {kind}" for kind, count in sizes.items())
        console.print(f"--quant {quant}: about {words}", soft_wrap=True)


def show_account(account: Account) -> None:
    """Prints what the tensors and the files are for."""
    from instantrt.compiler.frontend.side_files import MERGED, READ

    console.print(
        f"tensors: {account.parameters} used by parameters, {account.quantization} by the quantization, "
        f"{sum(entry.count for entry in account.harmless)} harmless",
        soft_wrap=True,
    )
    for entry in account.harmless:
        console.print(f"  {entry.name} ({entry.count}): {entry.why}", highlight=False, soft_wrap=True)
    console.print(
        "files:", ", ".join(e.name for e in account.files if e.why in (READ, MERGED)) or "none read", soft_wrap=True
    )
    for entry in account.files:
        if entry.why not in (READ, MERGED):
            console.print(f"  {entry.name}: not read: {entry.why}", highlight=False, soft_wrap=True)
