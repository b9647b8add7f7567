"""From answers to what is said of an artifact: how far they are from the twin's, and whether that is an error."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from instantrt.compiler.smoke.ask import Heard
from instantrt.compiler.smoke.compare import Distance, distances, not_finite
from instantrt.compiler.smoke.explain import AS_ROUGH, causality, roughness, why_wrong
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.names import CACHED, LOGITS
from instantrt.compiler.smoke.original import arithmetic
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.ran import Ran, SmokeError, first_line, ort_version
from instantrt.compiler.smoke.steps import Call, alone
from instantrt.compiler.smoke.subject import Staged


def judge(subject: Staged, heard: Heard, found: Answers) -> Ran:
    """`found`, of the artifact, against the twin's answers; SmokeError where it is something else."""
    expected, bound = heard.references[subject.twin], subject.bound
    check_finite(subject, expected, heard.steps)
    expected = expected | batched(expected, found)
    every = list(distances(found, expected, heard.steps))
    wrong = [each for each in every if not each.within(bound.model)]
    notes = (explained(subject, wrong, found, expected, heard.steps),) if wrong else ()
    worst = max(every, key=lambda each: each.relative)
    return Ran(subject.target.name, worst, bound, notes, peak_kb=heard.peak_kb)


def check_finite(subject: Staged, expected: Answers, steps: Sequence[Call]) -> None:
    bad = not_finite(expected, steps, every=subject.llm is None)
    if bad is None:
        return
    first = ""
    with suppress(Exception):  # not every graph can be asked here
        first = lockstep(subject.twin.graph, steps)[1]
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
    subject: Staged, wrong: Sequence[Distance], found: Answers, expected: Answers, steps: Sequence[Call]
) -> str:
    """Why what is beyond the bound is no error all the same; SmokeError where it is one."""
    first = wrong[0]
    step = f"{alone(first.step)[0]} of two rows in the cache" if first.step.startswith(CACHED) else first.step
    why = why_wrong(subject, wrong, expected, steps)
    if not why:
        return (
            f"{step}: {first.output} is {first.relative:.0e} from the twin. No layer is beyond its bound: the model "
            "amplifies rounding"
        )
    raise SmokeError(
        f"the artifact for {subject.target.name} does not compute what the model does: {step}",
        where=subject.artifact.path,
        expected=f"{first.output} of the twin, within {subject.bound.model:.0e} ({subject.bound.name})",
        found="; ".join(filter(None, (first.found(), causality(found, expected), why))),
        fix="please report this; --no-smoke writes the artifact as it is, for a look with instantrt diff --bisect",
    )


def check_original(subject: Staged, heard: Heard) -> tuple[str, ...]:
    """Is what was compiled the graph of the .onnx file? A note where ONNX Runtime cannot say so."""
    if heard.original is None or subject.original is None:
        return ()
    if heard.original.failed:
        why = first_line(heard.original.failed)
        return (f"the .onnx file itself was not run: ONNX Runtime {ort_version()}: {why}",)
    read, bound = subject.references[-1], arithmetic(subject.original)
    expected = heard.references[read]
    wrong = [d for d in distances(heard.original.answers, expected, heard.steps) if not d.within(bound.model)]
    rough = roughness(read.graph, expected, heard.steps) if wrong else {}
    for each in wrong:
        if not each.relative <= AS_ROUGH * rough.get((each.step, each.output), 0.0):
            raise SmokeError(
                "what was compiled does not compute what the .onnx file does",
                where=str(subject.original),
                expected=f"its outputs by ONNX Runtime {ort_version()}, within {bound.model:.0e} ({bound.name})",
                found=each.found(),
                fix="export it at a newer opset; please report this with the file",
            )
    return ()
