"""Compares the forms of a compiled model: `instantrt diff OUT --model MODEL --text FILE`.

Float reference, canonical twin, artifact, lowered graph, engine: any two or more. `--bisect` says which pass and which
node first break the lowering. Ends with PASSED or FAILED, and with exit code 0 or 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import onnx_graphsurgeon as gs
import typer

from instantrt.compiler.accuracy.bisect import Culprit, Watch, bisect
from instantrt.compiler.accuracy.data import Data, llm_feeds, load_data
from instantrt.compiler.accuracy.forms import Limits, Subject
from instantrt.compiler.accuracy.run import check_artifacts, check_reports, show_verdict
from instantrt.compiler.accuracy.subjects import all_positions, subjects
from instantrt.compiler.artifact.manifest import MANIFEST, Artifact, read_manifest
from instantrt.compiler.artifact.staging import Staging
from instantrt.compiler.plan import Plan, Say, plan
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from instantrt.tools.cli.console import console, stages

BISECT_TOKENS = 32  # every tensor of the twin is kept


def request_of(out: Path, model: Path, target: str | None) -> tuple[Request, list[Artifact]]:
    """The request that made `out`, as its manifest records it, and the artifacts asked about."""
    artifacts = [a for a in read_manifest(out) if target in (None, a.target)]
    if not artifacts:
        known = ", ".join(a.target for a in read_manifest(out))
        raise UserError(f"no artifact for target {target}", where=str(out), expected=known)
    fields: dict[str, Any] = dict(artifacts[0].source["request"])
    if any(a.source["request"] != fields for a in artifacts):
        raise UserError("the artifacts are of several requests", where=str(out), fix="name one with --target")
    targets = tuple(a.target for a in artifacts)
    try:
        return Request(model=model, targets=targets, out=out, **fields), artifacts
    except TypeError as error:
        raise UserError("a manifest of another version", where=str(out / MANIFEST), found=str(error)) from None


def find_culprits(
    planned: Plan, request: Request, artifacts: Sequence[Artifact], data: Data, say: Say
) -> dict[str, Culprit]:
    """Target -> where its lowering first goes wrong; targets that are right are left out."""
    llm = planned.model.llm
    feeds = llm_feeds(data.batches[0][:1, :BISECT_TOKENS], llm) if llm is not None else data.feeds[0]
    found = {}
    for subject in subjects(planned, request, artifacts):
        watch = Watch(canonical=subject.canonical, feeds=feeds, dtype=subject.dtype, say=say)
        culprit = bisect(partial(all_positions, planned, request, find_target(subject.target)), watch, written(subject))
        if culprit is not None:
            found[subject.target] = culprit
    return found


def written(subject: Subject) -> gs.Graph | None:
    """The graph as its artifact holds it, where an artifact can be read back."""
    return subject.lowered if subject.file is not None and subject.file.suffix == ".onnx" else None


def main(
    out: Annotated[Path, typer.Argument(help="output folder of compile")],
    model: Annotated[Path, typer.Option(help="the checkpoint or .onnx file it was compiled from")],
    target: Annotated[str | None, typer.Option(help="which artifact, where there are several")] = None,
    text: Annotated[Path | None, typer.Option(help="a text in UTF-8 to measure on")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt to measure on; may be repeated")] = None,
    tokens: Annotated[int | None, typer.Option(help="at most so many tokens of the text")] = None,
    forms: Annotated[
        str, typer.Option(help="two or more of float, transformers, twin, artifact, lowered, engine")
    ] = "",
    max_kl: Annotated[float | None, typer.Option(help="bound on the mean KL, in nats")] = None,
    max_ppl_increase: Annotated[float | None, typer.Option(help="bound on the perplexity's increase, in %")] = None,
    report: Annotated[Path | None, typer.Option(help="folder for the reports; OUT/report if not given")] = None,
    find: Annotated[bool, typer.Option("--bisect", help="find the first pass and node that go wrong")] = False,
) -> None:
    """Say whether an artifact is right, and what quantization cost."""
    request, artifacts = request_of(out, model, target)
    folder = report or out / "report"
    if not find:
        check_reports(folder, request.resolved_targets())
    with stages() as say:
        planned = plan(request, say)
        data = load_data(planned.model, text, prompt or (), tokens)
        if find:
            culprits = find_culprits(planned, request, artifacts, data, say)
        else:
            chosen = tuple(f.strip() for f in forms.split(",") if f.strip())
            limits = Limits(max_kl, max_ppl_increase)
            with Staging() as staging:
                verdicts = check_artifacts(
                    planned, request, artifacts, data, limits, folder, staging, forms=chosen, say=say
                )
    if find:
        for name, culprit in culprits.items():
            console.print(f"{name}: {culprit}", soft_wrap=True)
        passed = not culprits
    else:
        for verdict in verdicts:
            show_verdict(console, verdict, folder)
        passed = all(v.passed for v in verdicts)
    console.print("PASSED" if passed else "FAILED")
    raise typer.Exit(0 if passed else 1)
