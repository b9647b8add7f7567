"""`instantrt compile MODEL --target T -o DIR`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instantrt.compiler import options as groups
from instantrt.compiler.request import Request, check_options, fields_from_json
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.options import Out, takes

if TYPE_CHECKING:
    from instantrt.compiler.accuracy.data import Data
    from instantrt.compiler.accuracy.verify import Verdict
    from instantrt.compiler.artifact.manifest import Artifact
    from instantrt.compiler.artifact.staging import Staging
    from instantrt.compiler.build import Plan

LOOKING = "Looking"
PANELS: dict[type, str] = {
    groups.Checkpoint: "",
    groups.Quantization: "Quantization",
    groups.CpuArtifacts: "CPU artifacts",
    groups.LanguageModel: "Language models",
    groups.Engines: "Engines",
    groups.EngineOptions: "Engines",
    groups.Plugins: "Engines",
    groups.Accuracy: "Accuracy",
    groups.Looking: LOOKING,
}


@takes(PANELS)
def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, or .onnx file")],
    targets: Annotated[list[str] | None, typer.Option("--target", help="what to compile for; may be repeated")] = None,
    out: Out = Path("build"),
    triton: Annotated[Path | None, typer.Option(help="folder for a Triton model repository of what OUT holds")] = None,
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="check the artifacts, write OUT/report/", rich_help_panel="Accuracy")
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
    config = quant_fields(options.pop("quant_config"), weight_only=options.pop("weight_only"))
    request = Request(model, tuple(targets or ()), out, **options, **config)
    if request.text is not None and not verify and not request.has_budget:
        raise UserError("--text does nothing by itself", expected="with --verify, --max-kl or --max-ppl-increase")
    compile_request(request, triton, verify=verify, explain=explain, dry_run=dry_run)


def quant_fields(file: Path | None, *, weight_only: bool) -> dict[str, Any]:
    """The fields of a request that --quant-config says; --weight-only may say the same."""
    if file is None:
        return {"weight_only": weight_only}
    from instantrt.compiler.checkpoint import read_json

    try:
        found = fields_from_json(read_json(file))
    except UserError as error:
        raise UserError(error.what, where=str(file), expected=error.expected, found=error.found) from None
    return {**found, "weight_only": weight_only or found.get("weight_only", False)}


def compile_request(request: Request, triton: Path | None, *, verify: bool, dry_run: bool, explain: bool) -> None:
    """Plans, writes and shows. What a user can have wrong is found before the long parts."""
    from instantrt.compiler.artifact.staging import Staging, artifacts_kept, check_out
    from instantrt.compiler.build import outline, plan, write_artifacts
    from instantrt.tools.cli import show as report
    from instantrt.tools.cli.console import console, stages, writing

    check_options(request)
    started, out, targets = time.monotonic(), request.out, request.resolved_targets()
    check_out(out, targets, [request.model, *([triton] if triton is not None else [])])
    if triton is not None:
        from instantrt.compiler.serving.repository import check_folder, plan_repository, stage_repository

        check_folder(triton)
    if verify:
        from instantrt.compiler.accuracy.data import load_data
        from instantrt.compiler.accuracy.run import check_reports, show_verdict

        check_reports(out / "report", targets)
    with stages() as say:
        planned = plan(request, say)
    report.show_notes(planned)
    if explain:
        report.show_explanation(planned)
    if dry_run:
        report.show_plan(request, planned)
        return
    data = load_data(planned.model, request.text) if verify else None
    if triton is not None:
        plan_repository([*artifacts_kept(out, targets), *(outline(request, planned, target) for target in targets)])
    with Staging() as staging:
        with writing(sum(planned.size(t) for t in planned.lowered)) as progress:
            artifacts = write_artifacts(request, planned, staging, progress)
        verdicts = verdicts_on(planned, request, artifacts, data, staging) if data is not None else []
        passed = all(verdict.passed for verdict in verdicts)
        served = stage_repository(staging.aside(out), triton, staging) if triton is not None and passed else ()
    report.show_artifacts(out, artifacts, every_weight=explain)
    for each in served:
        console.print(f"{triton}  {', '.join(each.models) or 'none: ' + each.no_bare}", soft_wrap=True)
    for verdict in verdicts:
        show_verdict(console, verdict, out / "report")
    if not passed:
        left = "" if triton is None else f"; {triton} is as it was"
        console.print(f"FAILED: the artifacts are written, but they are not what they should be{left}")
        raise typer.Exit(1)
    console.print(f"PASSED in {time.monotonic() - started:.1f} s")


def verdicts_on(
    planned: Plan, request: Request, artifacts: list[Artifact], data: Data, staging: Staging
) -> list[Verdict]:
    """Verifies the artifacts where they lie aside, and leaves a report for each beside them."""
    from instantrt.compiler.accuracy.forms import Limits
    from instantrt.compiler.accuracy.run import check_artifacts
    from instantrt.tools.cli.console import stages

    aside, folder = replace(request, out=staging.aside(request.out)), request.out / "report"
    limits = Limits(request.max_kl, request.max_ppl_increase)
    with stages() as say:
        return check_artifacts(planned, aside, artifacts, data, limits, folder, staging, say=say)
