"""What `compile --verify` and `instantrt diff` share: from a plan to reports and a verdict on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from instantrt.compiler.accuracy.budget import Bought
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.forms import Limits
from instantrt.compiler.accuracy.report import HTML, JSON, number, write_report
from instantrt.compiler.accuracy.subjects import subjects
from instantrt.compiler.accuracy.verify import Verdict, verify
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.artifact.staging import Staging
from instantrt.compiler.plan import Plan, Say
from instantrt.compiler.request import Request
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError

SHOWN = 12  # violations that a terminal shows; the report has all


def check_artifacts(
    planned: Plan,
    request: Request,
    artifacts: Iterable[Artifact],
    data: Data,
    limits: Limits,
    folder: Path,
    staging: Staging,
    *,
    forms: Sequence[str] = (),
    say: Say = lambda text: None,
) -> list[Verdict]:
    """Verifies every target and writes, aside, `folder`/<target>/report.html, .json, .png and Polygraphy's files.

    The artifacts, too, may lie aside: in `request.out`.
    """
    verdicts = []
    for subject in subjects(planned, request, artifacts):
        partial = staging.staged(folder) / subject.target
        partial.mkdir()
        verdict = verify(subject, data, partial, forms=forms, limits=limits, final=staging.final, say=say)
        write_report(verdict, partial)
        verdicts.append(verdict)
    return verdicts


def check_reports(folder: Path, targets: Iterable[Target]) -> None:
    """Refuses, before any work, to replace what is no report."""
    for target in targets:
        there = folder / target.name
        if os.path.lexists(there) and not (there / JSON).is_file():
            raise UserError(
                "this is no report of ours, and would be lost",
                where=str(there),
                fix="move it away, or name another folder",
            )


def show_verdict(console: Console, verdict: Verdict, folder: Path) -> None:
    """One table and the violations; the report's path last."""
    if verdict.data.warning:
        console.print(verdict.data.warning, style="bold yellow", soft_wrap=True)
    table = Table(
        "kind", "form", "against", "relative L2", "bound", "arithmetic", title=f"accuracy of {verdict.target}"
    )
    for c in verdict.comparisons:
        table.add_row(c.kind, c.form, c.reference, number(c.relative_l2), number(c.bound), c.arithmetic)
    console.print(table)
    if verdict.note:
        console.print(verdict.note, soft_wrap=True)
    f = verdict.figures
    if f:
        console.print(
            f"quantization: perplexity ratio {f['perplexity_ratio']:.5f}, KL {f['kl_mean']:.3g}, "
            f"top-1 {f['top1_agreement']:.2%}, top-5 {f['top5_agreement']:.2%}",
            soft_wrap=True,
        )
    if verdict.perplexities:
        each = ", ".join(f"{form} {value:.4f}" for form, value in verdict.perplexities.items())
        console.print(f"perplexity of each form: {each}", soft_wrap=True)
    for violation in verdict.violations[:SHOWN]:
        console.print(violation, style="red", soft_wrap=True)
    if len(verdict.violations) > SHOWN:
        console.print(f"... and {len(verdict.violations) - SHOWN} more in the report")
    console.print(f"{folder / verdict.target / HTML}", soft_wrap=True)


def show_bought(console: Console, bought: Bought, targets: str) -> None:
    """What a budget bought, and what it cost."""
    table = Table("layer", "was", "is", "bytes more", title=f"accuracy budget of {targets}")
    for layer, now in bought.layers.items():
        steps = [s for s in bought.steps if s.layer == layer]
        table.add_row(layer, steps[0].before, now, f"{sum(s.bytes for s in steps):,}")
    if bought.layers:
        console.print(table)
    share = bought.bytes / max(1, bought.bytes_before)
    console.print(
        f"{len(bought.layers)} layers in a finer format: +{bought.bytes / 1e6:,.2f} MB ({share:+.1%}); "
        f"KL {bought.before['kl_mean']:.4g} -> {bought.after['kl_mean']:.4g}, "
        f"perplexity ratio {bought.before['perplexity_ratio']:.5f} -> {bought.after['perplexity_ratio']:.5f}, "
        f"{bought.trials} trials on {bought.after['tokens']:.0f} tokens ({bought.data})",
        soft_wrap=True,
    )
