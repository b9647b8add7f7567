"""`instantrt gpu-check`: hands its arguments on to tools/gpu/, whose machine may have no typer to parse them."""

from __future__ import annotations

import typer

from instantrt.passes.core.errors import UserError

main = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def hand_on(ctx: typer.Context) -> None:
    """`rtx prepare` and `rtx run` try TensorRT-RTX's engines, all else the kernels."""
    from instantrt.tools.gpu import check, rtx
    from instantrt.tools.places import ROOT

    if not (ROOT / "tests").is_dir():
        raise UserError("gpu-check runs from a checkout: what it builds and tests is not all in the installed package")
    name, *words = ctx.args or [""]
    if name == "rtx":
        rtx.main(words, "instantrt gpu-check rtx")
    else:
        check.main(ctx.args, "instantrt gpu-check")
