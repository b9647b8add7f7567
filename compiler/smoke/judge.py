"""From answers to what is said of an artifact: how far they are from the twin's, and whether that is an error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from instantrt.compiler.accuracy.bounds import BETWEEN
from instantrt.compiler.smoke.ask import Heard
from instantrt.compiler.smoke.compare import Distance, distances, not_finite
from instantrt.compiler.smoke.explain import causality, too_coarse, why_wrong
from instantrt.compiler.smoke.lockstep import first_not_finite
from instantrt.compiler.smoke.names import CACHED, LOGITS
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.ran import Ran, SmokeError
from instantrt.compiler.smoke.steps import Call, alone
from instantrt.compiler.smoke.subject import Staged


def judge(subject: Staged, heard: Heard, found: Answers) -> Ran:
    """`found`, of the artifact, against the twin's answers; SmokeError where it is something else."""
    expected, bound = heard.references[subject.twin], subject.bound
    check_finite(subject, expected, heard.steps)
    expected = expected | batched(expected, found)
    held = ((heard.tapped, BETWEEN.get(bound, bound.model)), (found, bound.model))
    every = [(limit, each) for answers, limit in held for each in distances(answers, expected, heard.steps)]
    wrong = [(limit, each) for limit, each in every if not each.within(limit)]
    notes = (explained(subject, wrong, found, expected, heard),) if wrong else ()
    limit, worst = max(every, key=lambda each: each[1].relative / each[0])
    return Ran(subject.target.name, worst, bound, limit, notes, peak_kb=heard.peak_kb)


def check_finite(subject: Staged, expected: Answers, steps: Sequence[Call]) -> None:
    bad = not_finite(expected, steps, every=subject.llm is None and subject.planned.model.encoder is None)
    if bad is None:
        return
    first = ""
    with suppress(Exception):  # not every graph can be asked here
        first = first_not_finite(subject.twin.graph, steps)
    raise SmokeError(
        "the model itself gives values that are not finite",
        where=f"{bad[1]}, {bad[0]}",
        found=f"the first tensor that has some is {first}" if first else "",
        fix="look at the checkpoint's weights; --no-smoke writes the artifact all the same",
    )


def batched(expected: Answers, found: Answers) -> Answers:
    """What a batch of both rows must answer: each row by itself."""
    return {
        step: {LOGITS: np.concatenate([expected[name][LOGITS][:, -1] for name in alone(step)])}
        for step in found
        if step.startswith(CACHED)
    }


def explained(
    subject: Staged, wrong: Sequence[tuple[float, Distance]], found: Answers, expected: Answers, heard: Heard
) -> str:
    """Why what is beyond the bound is no error all the same; SmokeError where it is one."""
    limit, first = wrong[0]
    step = f"{alone(first.step)[0]} of two rows in the cache" if first.step.startswith(CACHED) else first.step
    why = why_wrong(subject, [each for _, each in wrong], expected, heard)
    if not why:
        return (
            f"{step}: {first.output} {first.odd or f'is {first.relative:.0e} from the twin'}. "
            "No layer is beyond its bound: the model amplifies rounding"
        )
    way_out = (
        "compile it for a CPU, which computes in float32" if why == too_coarse(subject.dtype) else "please report this"
    )
    raise SmokeError(
        f"the artifact for {subject.target.name} does not compute what the model does: {step}",
        where=subject.artifact.path,
        expected=f"{first.output} of the twin, within {limit:.0e} ({subject.bound.name})",
        found="; ".join(filter(None, (first.found(), causality(found, expected), why))),
        fix=f"{way_out}; --no-smoke writes the artifact as it is, for a look with instantrt diff --bisect",
    )
