"""`instantrt compile MODEL --target T -o DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from instantrt.compiler import options as groups
from instantrt.compiler.request import Request, fields_from_json
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.options import Out, takes

CHECKING = "Checking"
LOOKING, ACCURACY = "Looking", "Accuracy: layers get finer formats until the bounds hold"
PANELS: dict[type, str] = {
    groups.Checkpoint: "",
    groups.Quantization: "Quantization",
    groups.CpuArtifacts: "CPU artifacts",
    groups.LanguageModel: "Language models",
    groups.Engines: "Engines",
    groups.EngineOptions: "Engines",
    groups.Plugins: "Engines",
    groups.Accuracy: ACCURACY,
    groups.Size: "Size: layers get finer formats as long as there is room",
    groups.Checking: CHECKING,
    groups.Looking: LOOKING,
}


@takes(PANELS)
def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, .gguf file or .onnx file")],
    targets: Annotated[list[str] | None, typer.Option("--target", help="what to compile for; may be repeated")] = None,
    out: Out = Path("build"),
    triton: Annotated[Path | None, typer.Option(help="folder for a Triton model repository of what OUT holds")] = None,
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="check the artifacts, write OUT/report/", rich_help_panel=ACCURACY)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan, write nothing", rich_help_panel=LOOKING)
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="print what each layer became, and why", rich_help_panel=LOOKING)
    ] = False,
    **options: Any,
) -> None:
    """Compiles, and prints what became of it."""
    from instantrt.tools.cli.console import Stages, console

    with Stages() as stages:
        stages.begin("starting")
        from instantrt.compiler.compile import VerificationError, check_places, compile_model
        from instantrt.compiler.plan import plan
        from instantrt.tools.cli.show import ConsoleWatch, show_plan

        config = quant_fields(options.pop("quant_config"), weight_only=options.pop("weight_only"))
        request = Request(model, tuple(targets or ()), out, **options, **config)
        watch = ConsoleWatch(request, triton, stages, explain=explain)
        if dry_run:
            check_places(request, verify=verify, triton=triton)
            planned = plan(request, watch.say)
            watch.planned(planned)
            stages.end()
            show_plan(request, planned)
            return
        try:
            artifacts = compile_model(request, verify=verify, triton=triton, watch=watch)
        except VerificationError as error:
            watch.finished(error.artifacts)
            raise
        watch.finished(artifacts)
        console.print(f"PASSED in {stages.summary()}")


def quant_fields(file: Path | None, *, weight_only: bool) -> dict[str, Any]:
    """The fields of a request that --quant-config says; --weight-only may say the same."""
    if file is None:
        return {"weight_only": weight_only}
    from instantrt.compiler.json_file import read_json

    try:
        found = fields_from_json(read_json(file))
    except UserError as error:
        raise UserError(error.what, where=str(file), expected=error.expected, found=error.found) from None
    return {**found, "weight_only": weight_only or found.get("weight_only", False)}
