"""Runs every artifact of a plan, where it is staged, and holds it against the twin; the first wrong one is an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from instantrt.compiler.accuracy.engine_runner import EngineRunner
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.compiler.smoke.ask import Heard, ask
from instantrt.compiler.smoke.compare import Distance
from instantrt.compiler.smoke.judge import judge
from instantrt.compiler.smoke.on_gpu import engine_answers, why_not
from instantrt.compiler.smoke.original import check_original, draws
from instantrt.compiler.smoke.process import Answers, Child
from instantrt.compiler.smoke.ran import Ran
from instantrt.compiler.smoke.subject import Reference, Staged, staged


def smoke(
    planned: Plan, request: Request, artifacts: Sequence[Artifact], take: Callable[[], Child], say: Say
) -> Iterator[Ran]:
    """What became of each artifact in `request.out`, as it is known; SmokeError for one that is wrong.

    take   gives the processes that run them
    """
    known: dict[Reference, Answers] = {}
    for target, artifact in zip(request.resolved_targets(), artifacts, strict=True):
        started = time.monotonic()
        subject = staged(planned, request, target, artifact, say)
        heard = ask(subject, known, take)
        known |= heard.references
        yield replace(ran(subject, heard), seconds=time.monotonic() - started)


def ran(subject: Staged, heard: Heard) -> Ran:
    """The artifact's answers; of an engine, once its graph is right, those of the engine itself where it runs here."""
    operator = draws(subject.twin.graph)
    why = heard.not_compared or (f"{operator} makes every run another one" if operator else "")
    if why:
        note = f"not compared: {why}"
        return Ran(subject.target.name, Distance("", ""), subject.bound, notes=(note,), peak_kb=heard.peak_kb)
    notes = check_original(subject, heard)
    found = judge(subject, heard, heard.answers)
    if not subject.on_cpu:
        if lacking := why_not(subject.artifact):
            notes = (f"the lowered graph ran, on this CPU; {lacking}", *notes)
        else:
            libraries = [subject.request.out / name for name in subject.artifact.plugins]
            names = [t.name for t in subject.graph.outputs]
            runner = EngineRunner(subject.file, libraries, names, every_position=False)
            found = judge(subject, heard, engine_answers(runner, heard.steps))
    return replace(found, notes=(*notes, *found.notes))
