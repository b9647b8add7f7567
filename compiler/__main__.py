"""The command line: `compile MODEL --target T -o DIR`."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from compiler.checkpoint import read_json
from passes.errors import UserError

if TYPE_CHECKING:
    from compiler.accuracy.data import Data
    from compiler.accuracy.verify import Verdict
    from compiler.artifact import Artifact
    from compiler.build import Plan
    from compiler.output import Staging
    from compiler.request import Request

# Groups of options in --help.
quantization = partial(typer.Option, rich_help_panel="Quantization")
cpu = partial(typer.Option, rich_help_panel="CPU artifacts")
engines = partial(typer.Option, rich_help_panel="Engines")
accuracy = partial(typer.Option, rich_help_panel="Accuracy")
looking = partial(typer.Option, rich_help_panel="Looking, not compiling")
INTERRUPTED = 130  # the exit status that typer makes of an interruption

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compile_command(
    model: Annotated[Path | None, typer.Argument(help="Hugging Face folder, or .onnx file")] = None,
    target: Annotated[list[str] | None, typer.Option(help="what to compile for; may be repeated")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("build"),
    triton: Annotated[Path | None, typer.Option(help="folder for a Triton model repository of what OUT holds")] = None,
    quant: Annotated[str | None, quantization(help="a16w8, a16w4, a8w8, a8w4 or none")] = None,
    group_size: Annotated[int | None, quantization(help="inputs that share a scale; -1 per channel")] = None,
    weight_only: Annotated[bool, quantization("--weight-only", help="8-bit GPTQ as A16W8 instead of A8W8")] = False,
    quant_config: Annotated[Path | None, quantization(help="JSON file with the spec's keys")] = None,
    ignore: Annotated[list[str] | None, quantization(help="module pattern that stays float; may be repeated")] = None,
    lm_head: Annotated[str, quantization(help="float or int8")] = "float",
    embeddings: Annotated[str, quantization(help="stored or int8")] = "stored",
    cpu_preset: Annotated[str, cpu(help="of 16-bit activations: exact keeps 14 bits, fast 8")] = "exact",
    portable: Annotated[bool, cpu("--portable", help="standard ONNX attention")] = False,
    builder: Annotated[str, engines(help="auto, tensorrt-rtx, tensorrt or kit")] = "auto",
    max_batch: Annotated[int, engines(help="sequences that run together")] = 1,
    max_length: Annotated[int | None, engines(help="tokens of a sequence, cache included")] = None,
    opt_length: Annotated[int | None, engines(help="the length to tune for")] = None,
    logits: Annotated[str, engines(help="last (of each sequence) or all")] = "last",
    kv_cache: Annotated[str, engines(help="concat or in-place")] = "concat",
    memory_limit: Annotated[int | None, engines(help="MiB of scratch memory")] = None,
    optimization_level: Annotated[int | None, engines(help="0 to 5")] = None,
    weight_streaming: Annotated[bool, engines("--weight-streaming", help="weights may stay on the host")] = False,
    version_compatible: Annotated[bool, engines("--version-compatible", help="for newer TensorRT too")] = False,
    hardware_compatible: Annotated[str, engines(help="ampere_plus, say: for other GPUs too")] = "",
    plugin: Annotated[Path | None, engines(help="our plugin library, for weight-only linears; auto: installed")] = None,
    plugin_rounding: Annotated[
        bool, engines("--plugin-rounding", help="long prefill may round weights to 16 bits, for cuBLASLt")
    ] = False,
    timing_cache: Annotated[Path | None, engines(help="file of timings that builds share")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run the model's own Python")] = False,
    max_kl: Annotated[float | None, accuracy(help="budget: finer formats until the KL is below this")] = None,
    max_ppl_increase: Annotated[float | None, accuracy(help="the same for perplexity, in percent")] = None,
    text: Annotated[Path | None, accuracy(help="text for budgets and --verify, in UTF-8")] = None,
    verify: Annotated[bool, accuracy("--verify", help="check the artifacts, write OUT/report/")] = False,
    dry_run: Annotated[bool, looking("--dry-run", help="print the plan, write nothing")] = False,
    explain: Annotated[bool, looking("--explain", help="print what each layer became, and why")] = False,
    check: Annotated[Path | None, looking(help="verify an output folder: digests, versions, loading")] = None,
    inspect: Annotated[Path | None, looking(help="examine a checkpoint's folder: format, layers, problems")] = None,
    json_output: Annotated[bool, looking("--json", help="with --inspect: machine-readable")] = False,
    list_targets: Annotated[bool, looking("--list-targets", help="print the targets")] = False,
) -> None:
    """Compile MODEL into quantized artifacts, one for each --target.

    `compile build KIT` finishes a build kit on the machine with its GPU.
    """
    from compiler import report

    if list_targets:
        report.show_targets()
        return
    if inspect is not None:
        show_inspection(inspect, trust_remote_code=trust_remote_code, as_json=json_output)
        return
    if check is not None:
        from compiler.check import check as check_folder_of_artifacts

        for line in check_folder_of_artifacts(check):
            report.console.print(line, soft_wrap=True)
        report.console.print("PASSED")
        return
    if model is None:
        raise UserError("no model given", expected="compile MODEL --target T -o DIR", fix="compile --help")
    from compiler.request import Request, fields_from_json

    fields: dict[str, Any] = {"quant": quant, "group_size": group_size, "weight_only": weight_only}
    if quant_config is not None:
        try:
            given = fields_from_json(read_json(quant_config))
        except UserError as error:
            raise UserError(error.what, where=str(quant_config), expected=error.expected, found=error.found) from None
        fields |= {**given, "weight_only": weight_only or given.get("weight_only", False)}
    request = Request(
        model=model,
        targets=tuple(target or ()),
        out=out,
        ignore=tuple(ignore or ()),
        lm_head=lm_head,  # type: ignore[arg-type]
        embeddings=embeddings,  # type: ignore[arg-type]
        cpu_preset=cpu_preset,  # type: ignore[arg-type]
        portable=portable,
        builder=builder,  # type: ignore[arg-type]
        max_batch=max_batch,
        max_length=max_length,
        opt_length=opt_length,
        logits=logits,  # type: ignore[arg-type]
        kv_cache=kv_cache,  # type: ignore[arg-type]
        memory_limit=memory_limit,
        optimization_level=optimization_level,
        weight_streaming=weight_streaming,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        timing_cache=timing_cache,
        plugin=plugin,
        plugin_rounding=plugin_rounding,
        trust_remote_code=trust_remote_code,
        max_kl=max_kl,
        max_ppl_increase=max_ppl_increase,
        text=text,
        **fields,
    )
    compile_request(request, triton, verify=verify, dry_run=dry_run, explain=explain)


def compile_request(request: Request, triton: Path | None, *, verify: bool, dry_run: bool, explain: bool) -> None:
    """Plans, writes and shows. What a user can have wrong is found before the long parts."""
    from compiler import report
    from compiler.build import outline, plan, write_artifacts
    from compiler.output import Staging, artifacts_kept, check_out

    started, out, targets = time.monotonic(), request.out, request.resolved_targets()
    check_out(out, targets, [request.model, *([triton] if triton is not None else [])])
    if triton is not None:
        from compiler.repository import check_folder, plan_repository, stage_repository

        check_folder(triton)
    if verify:
        from compiler.accuracy.data import load_data
        from compiler.accuracy.run import check_reports, show_verdict

        check_reports(out / "report", targets)
    with report.console.status("") as status:
        planned = plan(request, status.update)
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
        with report.writing(sum(planned.size(t) for t in planned.lowered)) as progress:
            artifacts = write_artifacts(request, planned, staging, progress)
        verdicts = verdicts_on(planned, request, artifacts, data, staging) if data is not None else []
        passed = all(verdict.passed for verdict in verdicts)
        served = stage_repository(staging.aside(out), triton, staging) if triton is not None and passed else ()
    report.show_artifacts(out, artifacts, every_weight=explain)
    for each in served:
        report.console.print(f"{triton}  {', '.join(each.models) or 'none: ' + each.no_bare}", soft_wrap=True)
    for verdict in verdicts:
        show_verdict(report.console, verdict, out / "report")
    if not passed:
        left = "" if triton is None else f"; {triton} is as it was"
        report.console.print(f"FAILED: the artifacts are written, but they are not what they should be{left}")
        raise typer.Exit(1)
    report.console.print(f"PASSED in {time.monotonic() - started:.1f} s")


def show_inspection(folder: Path, *, trust_remote_code: bool, as_json: bool) -> None:
    """Prints what is found; a checkpoint with problems ends with exit status 1."""
    import json

    from compiler import inspect as doctor

    found = doctor.inspect(folder, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(doctor.as_json(found), indent=2))
    else:
        doctor.show(found)
    if found.problems:
        raise typer.Exit(1)


def build_command(
    kit: Annotated[Path, typer.Argument(help="a build kit that compile left")],
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("build"),
    builder: Annotated[str, typer.Option(help="auto, tensorrt-rtx or tensorrt")] = "auto",
) -> None:
    """Finish a build KIT on the machine with the GPU it was made for."""
    from compiler import report
    from compiler.build import build_kit
    from compiler.kit import read_kit

    started = time.monotonic()
    with report.console.status("") as status:
        artifact = build_kit(read_kit(kit), out, builder, status.update)  # type: ignore[arg-type]
    report.console.print(f"{out / artifact.path}", soft_wrap=True)
    report.show_engine(artifact.target, artifact.engine or {}, every_weight=False)
    report.console.print(f"PASSED in {time.monotonic() - started:.1f} s")


def verdicts_on(
    planned: Plan, request: Request, artifacts: list[Artifact], data: Data, staging: Staging
) -> list[Verdict]:
    """Verifies the artifacts where they lie aside, and leaves a report for each beside them."""
    from compiler import report
    from compiler.accuracy.forms import Limits
    from compiler.accuracy.run import check_artifacts

    aside, folder = replace(request, out=staging.aside(request.out)), request.out / "report"
    limits = Limits(request.max_kl, request.max_ppl_increase)
    with report.console.status("verifying") as status:
        return check_artifacts(planned, aside, artifacts, data, limits, folder, staging, say=status.update)


def main() -> NoReturn:
    """Runs the command; an error of the user or the system prints without a traceback and exits with 1.

    An interruption exits with 130.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if sys.argv[1:2] == ["build"] and len(sys.argv) > 2:  # a model folder of that name is ./build
            del sys.argv[1]
            typer.run(build_command)
        app()
    except (UserError, OSError) as error:
        print(f"error: {error}\nFAILED", file=sys.stderr)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("interrupted; nothing half-written was left\nFAILED", file=sys.stderr)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
