"""Compares the forms of a compiled model: `instantrt diff OUT --model MODEL --text FILE`.

Float reference, canonical twin, artifact, lowered graph, engine: any two or more. `--bisect` says which pass and which
node first break the lowering. Ends with PASSED or FAILED, and with exit code 0 or 1.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from instantrt.compiler.options import Accuracy
from instantrt.passes.core.errors import reworded
from instantrt.tools.cli.console import Stages, console, tell
from instantrt.tools.cli.options import Folder, Which, takes


@takes({Accuracy: ""})
def main(
    out: Folder,
    model: Annotated[Path, typer.Option(help="the checkpoint or .onnx file it was compiled from")],
    target: Which = None,
    *,
    calibration: Annotated[Path | None, typer.Option(help="the text that the weights were fitted to")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="the adapter that was merged into it")] = None,
    base: Annotated[Path | None, typer.Option(help="the adapter's base, where MODEL is the adapter")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt to measure on; may be repeated")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="at most so many tokens of the text")] = None,
    forms: Annotated[
        str, typer.Option(help="two or more of float, transformers, twin, artifact, lowered, engine")
    ] = "",
    report: Annotated[Path | None, typer.Option(help="folder for the reports; OUT/report if not given")] = None,
    find: Annotated[bool, typer.Option("--bisect", help="find the first pass and node that go wrong")] = False,
    **bounds: Any,
) -> None:
    """Prints verdicts, or with --bisect culprits."""
    from instantrt.compiler.accuracy.bisect import find_culprits
    from instantrt.compiler.accuracy.data import load_data
    from instantrt.compiler.accuracy.forms import Budget
    from instantrt.compiler.accuracy.run import check_artifacts, check_reports
    from instantrt.compiler.accuracy.subjects import changed_files, request_of
    from instantrt.compiler.accuracy.verify import check_names
    from instantrt.compiler.artifact.staging import Staging
    from instantrt.compiler.frontend.own_names import own_names
    from instantrt.compiler.plan import plan
    from instantrt.tools.cli.show_accuracy import show_verdict

    text = bounds.pop("text")
    chosen = tuple(f.strip() for f in forms.split(",") if f.strip())
    check_names(chosen)
    request, artifacts = request_of(out, model, target, calibration, adapter=adapter or (), base=base)
    folder = report or out / "report"
    if not find:
        check_reports(folder, request.resolved_targets())
    with Stages() as stages, ExitStack() as stack:
        planned = plan(request, stages.say)
        stack.enter_context(reworded(own_names(planned.model.held, model)))
        data = load_data(planned.model, text, prompt or (), tokens, longest=request.max_length)
        if find:
            culprits = find_culprits(planned, request, artifacts, data, stages.say)
            verdicts = []
        else:
            budget, culprits = Budget(**bounds), {}
            with Staging() as staging:
                verdicts = check_artifacts(
                    planned,
                    request,
                    artifacts,
                    data,
                    budget,
                    folder,
                    staging,
                    forms=chosen,
                    again=True,
                    say=stages.say,
                )
    for name, culprit in culprits.items():
        console.print(f"{name}: {culprit}", soft_wrap=True)
    for verdict in verdicts:
        show_verdict(verdict, folder)
    passed = not culprits and all(v.passed for v in verdicts)
    if not passed and (changed := changed_files(artifacts, planned.model.files)):
        tell(f"note: not what the artifact was made of, as its manifest has it: {', '.join(changed)} of {model}")
    console.print("PASSED" if passed else "FAILED")
    raise typer.Exit(0 if passed else 1)
