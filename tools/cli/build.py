"""`instantrt build KIT -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from instantrt.tools.cli.options import Out

Finisher = Literal["auto", "tensorrt-rtx", "tensorrt"]
BUILDERS = f"who builds: {', '.join(get_args(Finisher))}"


def main(
    kit: Annotated[Path, typer.Argument(help="a build kit that compile left")],
    out: Out = Path("build"),
    builder: Annotated[Finisher, typer.Option(metavar="<builder>", help=BUILDERS)] = "auto",
) -> None:
    """Builds, and prints how the engine reads its weights."""
    from instantrt.compiler.backend.tensorrt.build import PRODUCT
    from instantrt.compiler.backend.tensorrt.kit import build_kit, read_kit
    from instantrt.tools.cli.console import Stages, console
    from instantrt.tools.cli.show import show_engine

    with Stages() as stages:
        stages.begin(f"reading {kit}")
        found = read_kit(kit)
        stages.begin(f"building the engine for {found.settings.target.name}")
        artifact = build_kit(found, out, builder, stages.say)
    engine = artifact.engine or {}
    console.print(f"{out / artifact.path}, built by {PRODUCT[engine['builder']]} {engine['version']}", soft_wrap=True)
    show_engine(artifact.target, engine, every_weight=False)
    console.print(f"PASSED in {stages.summary()}")
