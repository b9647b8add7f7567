"""What `compile --verify` and `instantrt diff` share: from a plan and its artifacts to verdicts and reports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.forms import Budget
from instantrt.compiler.accuracy.report import JSON, write_report
from instantrt.compiler.accuracy.subjects import subjects
from instantrt.compiler.accuracy.verify import Verdict, verify
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.artifact.staging import Staging
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request, refuse_cosine
from instantrt.compiler.say import Say
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError, require


def check_artifacts(
    planned: Plan,
    request: Request,
    artifacts: Iterable[Artifact],
    data: Data,
    budget: Budget,
    folder: Path,
    staging: Staging,
    *,
    forms: Sequence[str] = (),
    again: bool = False,
    say: Say = lambda text: None,
) -> list[Verdict]:
    """Verifies every target and writes, aside, `folder`/<target>/report.html, .json, .png and Polygraphy's files.

    The artifacts, too, may lie aside: in `request.out`. `again`: they were written from another plan.
    """
    if planned.model.encoder is None:
        refuse_cosine(budget.min_cosine, str(request.model))
    verdicts = []
    for subject in subjects(planned, request, artifacts, again=again):
        partial = staging.staged(folder) / subject.target
        partial.mkdir()
        verdict = verify(subject, data, partial, forms=forms, budget=budget, final=staging.final, say=say)
        write_report(verdict, partial)
        verdicts.append(verdict)
    return verdicts


def check_reports(folder: Path, targets: Iterable[Target]) -> None:
    """Refuses, before any work, to replace what is no report, and to begin without what a report is made with."""
    require("accuracy", "an accuracy report")
    for target in targets:
        there = folder / target.name
        if os.path.lexists(there) and not (there / JSON).is_file():
            raise UserError(
                "this is no report of ours, and would be lost",
                where=str(there),
                fix="move it away, or name another folder",
            )
