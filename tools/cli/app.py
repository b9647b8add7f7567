"""The command line: `compile MODEL --target T -o DIR`."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import typer

from instantrt.compiler.backend.tensorrt.choose import Builder
from instantrt.compiler.checkpoint import read_json
from instantrt.compiler.quant.config import Quant
from instantrt.compiler.request import (
    HeadFormat,
    KvCache,
    Logits,
    Request,
    TableFormat,
    fields_from_json,
)
from instantrt.passes.core.errors import UserError
from instantrt.passes.ort.linear import Preset
from instantrt.tools.cli.ending import errors_told

# Groups of options in --help.
quantization = partial(typer.Option, rich_help_panel="Quantization")
cpu = partial(typer.Option, rich_help_panel="CPU artifacts")
engines = partial(typer.Option, rich_help_panel="Engines")
accuracy = partial(typer.Option, rich_help_panel="Accuracy")
looking = partial(typer.Option, rich_help_panel="Looking, not compiling")
# What looks at something else than a model to compile, and the only options that it takes.
APART = {"list_targets": (), "check": (), "inspect": ("json_output", "trust_remote_code")}
# Options that do nothing where none of these is given with them.
NEEDS = {"json_output": ("inspect",), "text": ("verify", "max_kl", "max_ppl_increase")}
Finisher = Literal["auto", "tensorrt-rtx", "tensorrt"]  # of a build kit
INTERRUPTED = 130  # the exit status that typer makes of an interruption


def words(choices: Any) -> str:
    """The values of a Literal in words, for --help: as its metavar a long list would take the whole width."""
    *first, last = get_args(choices)
    return f"{', '.join(first)} or {last}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def compile_command(
    ctx: typer.Context,
    model: Annotated[Path | None, typer.Argument(help="Hugging Face folder, or .onnx file")] = None,
    targets: Annotated[list[str] | None, typer.Option("--target", help="what to compile for; may be repeated")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("build"),
    triton: Annotated[Path | None, typer.Option(help="folder for a Triton model repository of what OUT holds")] = None,
    quant: Annotated[Quant | None, quantization(metavar="<format>", help=words(Quant))] = None,
    group_size: Annotated[int | None, quantization(help="inputs that share a scale; -1 per channel")] = None,
    weight_only: Annotated[bool, quantization("--weight-only", help="8-bit GPTQ as A16W8 instead of A8W8")] = False,
    quant_config: Annotated[Path | None, quantization(help="JSON file with the spec's keys")] = None,
    ignore: Annotated[list[str] | None, quantization(help="module pattern that stays float; may be repeated")] = None,
    lm_head: Annotated[HeadFormat, quantization(help="of a float checkpoint")] = Request.lm_head,
    embeddings: Annotated[TableFormat, quantization(help="stored: as in the checkpoint")] = Request.embeddings,
    cpu_preset: Annotated[Preset, cpu(help="of 16-bit activations: exact keeps 14 bits, fast 8")] = Request.cpu_preset,
    portable: Annotated[bool, cpu("--portable", help="standard ONNX attention")] = False,
    builder: Annotated[Builder, engines(metavar="<builder>", help=words(Builder))] = Request.builder,
    max_batch: Annotated[int, engines(help="sequences that run together")] = Request.max_batch,
    max_length: Annotated[int | None, engines(help="tokens of a sequence, cache included")] = None,
    opt_length: Annotated[int | None, engines(help="the length to tune for")] = None,
    logits: Annotated[Logits, engines(help="of the last token of each sequence, or of all")] = Request.logits,
    kv_cache: Annotated[KvCache, engines(help="present: a longer copy, or the same buffer")] = Request.kv_cache,
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
    given = locals()  # an option has the name of its field in a request
    check_given(ctx)
    if list_targets:
        from instantrt.tools.cli.show import show_targets

        show_targets()
    elif inspect is not None:
        show_inspection(inspect, trust_remote_code=trust_remote_code, as_json=json_output)
    elif check is not None:
        check_folder_of_artifacts(check)
    elif model is None:
        raise UserError("no model given", expected="compile MODEL --target T -o DIR", fix="compile --help")
    else:
        asked = {f.name: given[f.name] for f in fields(Request) if f.name in given}
        lists = {"targets": tuple(targets or ()), "ignore": tuple(ignore or ())}
        request = Request(**asked | lists | quant_fields(quant_config, weight_only=weight_only))
        compile_request(request, triton, verify=verify, explain=explain, dry_run=dry_run)


def check_given(ctx: typer.Context) -> None:
    """An option that has nothing to do beside the others is an error."""
    flags = {p.name: p.opts[-1] for p in ctx.command.params if came_from_user(ctx, p.name)}
    for alone, takes in APART.items():
        idle = [flag for name, flag in flags.items() if name not in (alone, *takes)]
        if alone in flags and idle:
            raise UserError(f"{flags[alone]} has no use for {' and '.join(idle)}", fix="leave one out")
    for name, needed in NEEDS.items():
        if name in flags and not flags.keys() & set(needed):
            options = (p.opts[-1] for p in ctx.command.params if p.name in needed)
            raise UserError(f"{flags[name]} does nothing by itself", expected=f"with {' or '.join(options)}")


def came_from_user(ctx: typer.Context, name: str | None) -> bool:
    source = ctx.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


def quant_fields(file: Path | None, *, weight_only: bool) -> dict[str, Any]:
    """The fields of a request that --quant-config says; --weight-only may say the same."""
    if file is None:
        return {"quant_config": None}
    try:
        found = fields_from_json(read_json(file))
    except UserError as error:
        raise UserError(error.what, where=str(file), expected=error.expected, found=error.found) from None
    return {"quant_config": None, **found, "weight_only": weight_only or found.get("weight_only", False)}


def compile_request(request: Request, triton: Path | None, *, verify: bool, dry_run: bool, explain: bool) -> None:
    """Compiles and prints what is to be seen of it."""
    from instantrt.compiler.compile import VerificationError, check_places, compile_model
    from instantrt.compiler.plan import plan
    from instantrt.tools.cli import show as report

    started = time.monotonic()
    with report.Shown(request, triton, explain=explain) as watch:
        if dry_run:
            check_places(request, verify=verify, triton=triton)
            planned = plan(request, watch.say)
            watch.planned(planned)
            report.show_plan(request, planned)
            return
        try:
            artifacts = compile_model(request, verify=verify, triton=triton, watch=watch)
        except VerificationError as error:
            watch.finished(error.artifacts)
            raise
        watch.finished(artifacts)
    report.console.print(f"PASSED in {time.monotonic() - started:.1f} s")


def check_folder_of_artifacts(folder: Path) -> None:
    """Prints a line for each artifact that is sound."""
    from instantrt.compiler.check import check
    from instantrt.tools.cli.show import console

    for line in check(folder):
        console.print(line, soft_wrap=True)
    console.print("PASSED")


def show_inspection(folder: Path, *, trust_remote_code: bool, as_json: bool) -> None:
    """Prints what is found; a checkpoint with problems ends with exit status 1."""
    import json

    from instantrt.compiler.inspect import inspect
    from instantrt.tools.cli.inspect import show

    found = inspect(folder, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found)
    if found.problems:
        raise typer.Exit(1)


def build_command(
    kit: Annotated[Path, typer.Argument(help="a build kit that compile left")],
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("build"),
    builder: Annotated[Finisher, typer.Option(metavar="<builder>", help=words(Finisher))] = "auto",
) -> None:
    """Finish a build KIT on the machine with the GPU it was made for."""
    from instantrt.compiler.backend.tensorrt.kit import build_kit, read_kit
    from instantrt.tools.cli import show as report

    started = time.monotonic()
    with report.stages(report.PAUSE) as say:
        artifact = build_kit(read_kit(kit), out, builder, say)
    report.console.print(f"{out / artifact.path}", soft_wrap=True)
    report.show_engine(artifact.target, artifact.engine or {}, every_weight=False)
    report.console.print(f"PASSED in {time.monotonic() - started:.1f} s")


def main() -> NoReturn:
    """Runs the command; an error of the user or the system prints without a traceback and exits with 1.

    An interruption exits with 130.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with errors_told():
            if sys.argv[1:2] == ["build"] and len(sys.argv) > 2:  # a model folder of that name is ./build
                del sys.argv[1]
                typer.run(build_command)
            app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("interrupted; nothing half-written was left\nFAILED", file=sys.stderr)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
