"""Asks every form of a model the same: files in a fresh process, what streams in this one, where it can meanwhile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.process import LOADING, Answers, Child, Ending, ModelOrder, started
from instantrt.compiler.smoke.ran import SmokeError, ort_version
from instantrt.compiler.smoke.steps import BY_ROW, Call, fed, prompts_of, typed
from instantrt.compiler.smoke.subject import Reference, Staged, has_branches
from instantrt.passes.core.errors import first_line

Known = Mapping[Reference, Answers]
Taken = tuple[Sequence[Call], Answers, str]  # the calls that count, the answers, why there are none


@dataclass(frozen=True)
class Heard:
    """What every form answered to `steps`; `original` is the .onnx file that was given.

    not_compared   why there is nothing to hold against each other
    """

    steps: Sequence[Call] = ()
    answers: Answers = field(default_factory=dict)
    references: Known = field(default_factory=dict)
    original: Ending | None = None
    not_compared: str = ""
    peak_kb: int = 0


def ask(subject: Staged, known: Known, take: Callable[[], Child]) -> Heard:
    """What the artifact and its references answer; SmokeError for an artifact that does not run.

    known   the answers of references that earlier targets had
    take    gives the process
    """
    if not subject.on_cpu and has_branches(subject.graph):
        return Heard(not_compared="its branches and loops run in an engine alone")
    llm = subject.llm
    with ExitStack() as stack:
        orders = orders_of(subject, known, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twin."))))
        feeds = fed(subject.steps, prompts_of(llm) if llm is not None else None)
        process = stack.enter_context(started(list(orders.values()), feeds, take)) if orders else None
        streaming = [each for each in subject.references if each.form not in orders and each not in known]
        meanwhile = evaluated(streaming, subject.steps) if llm is not None else {}
        outcomes = dict(zip(orders, process.outcomes() if process is not None else (), strict=True))
    references = {each: known[each] for each in subject.references if each in known}
    references |= {each: outcomes[each.form].answers for each in subject.references if each.form in outcomes}
    original = outcomes.get("original")
    taken = original.answers if original is not None else {}
    steps, answers, why = of_file(subject, outcomes, references) if subject.on_cpu else of_graph(subject, taken)
    if not steps:
        tried = f"it takes none of the random inputs that were tried: {why}"
        return Heard(not_compared=tried if subject.steps else "its inputs are too large to make up")
    references |= meanwhile if llm is not None else evaluated(streaming, steps)
    peak_kb = outcomes["artifact"].peak_kb if subject.on_cpu else 0
    return Heard(steps, answers, references, original, peak_kb=peak_kb)


def orders_of(subject: Staged, known: Known, folder: Path) -> dict[str, ModelOrder]:
    """Form -> its file and what to run of it. Small references are written into `folder`."""
    calls = tuple((step.name, step.after) for step in subject.steps)
    attempts = subject.llm is None
    orders = {"artifact": order_of_artifact(subject, calls)} if subject.on_cpu else {}
    for each in subject.references:
        if subject.on_cpu and each not in known and not each.streams:
            file = folder / f"{each.form}.onnx"
            write_model(each.graph.copy(), file)
            orders[each.form] = ModelOrder(str(file), calls, each.form, attempts=attempts)
    if subject.original is not None:
        orders["original"] = ModelOrder(str(subject.original), calls, "original", attempts=attempts)
    return orders


def order_of_artifact(subject: Staged, calls: tuple[tuple[str, str], ...]) -> ModelOrder:
    """Rows that decode do so in the cache of the runtime's engine, where the model is one for it."""
    llm, file = subject.llm, str(subject.file)
    if llm is None or {t.name for t in subject.graph.inputs} != set(llm.input_names()):
        return ModelOrder(file, calls, attempts=llm is None)
    own = tuple((name, after) for name, after in calls if not name.startswith(BY_ROW))
    return ModelOrder(file, own, cache=str(subject.artifact.limits.get("cache", "")))


def evaluated(references: Iterable[Reference], steps: Sequence[Call]) -> dict[Reference, Answers]:
    return {each: lockstep(each.graph, steps, dict(each.blocks))[0] for each in references}


def of_file(subject: Staged, outcomes: Mapping[str, Ending], references: Known) -> Taken:
    """The artifact's answers, to the inputs that every form took; SmokeError where it alone refuses some."""
    artifact, took = outcomes["artifact"], next(iter(outcomes["artifact"].answers), "")
    every = (*references.values(), *(outcome.answers for outcome in outcomes.values()))
    others = {next(iter(answers)) for answers in every if answers} - {took}
    failed = artifact.failed or (f"it takes {took}, and the model {min(others)}" if others else "")
    if failed and (others or subject.llm is not None or artifact.during in LOADING):
        loading = artifact.during in LOADING
        raise SmokeError(
            "the artifact cannot be loaded" if loading else f"the artifact does not run: {artifact.during}",
            where=subject.artifact.path,
            expected=f"a model that ONNX Runtime {ort_version()} runs",
            found=failed,
            fix="a newer onnxruntime, --portable where an operator of attention is named; else please report this",
        )
    for form, outcome in outcomes.items():
        if took and outcome.failed and form != "original":
            raise SmokeError(f"the {form} does not run", where=subject.artifact.path, found=outcome.failed)
    return [s for s in subject.steps if s.name == took or (took and subject.llm)], artifact.answers, artifact.failed


def of_graph(subject: Staged, original: Answers) -> Taken:
    """The answers of a graph for a GPU, to inputs that the .onnx file took, or else the first that fit."""
    if subject.llm is not None:
        return subject.steps, lockstep(subject.graph, [typed(s, subject.graph) for s in subject.steps])[0], ""
    last = ""
    for step in [s for s in subject.steps if s.name in original] or subject.steps:
        try:
            return [step], lockstep(subject.graph, [typed(step, subject.graph)])[0], ""
        except Exception as error:  # of NumPy, or of ONNX Runtime
            last = first_line(error)
    return (), {}, last
