"""Asks every form of a model the same: files in a fresh process, and graphs meanwhile in this one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.layer_errors import layers_of
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.names import PAST
from instantrt.compiler.smoke.process import LOADING, Answers, Child, Ending, ModelOrder, started
from instantrt.compiler.smoke.ran import SmokeError, ort_version
from instantrt.compiler.smoke.steps import BY_ROW, Call, fed, prompts_of, typed
from instantrt.compiler.smoke.subject import Reference, Staged, runs_here
from instantrt.passes.core.apart import apart
from instantrt.passes.core.errors import first_line

Known = Mapping[Reference, Answers]


@dataclass(frozen=True)
class Heard:
    """What every form answered to `steps`; `original` is the .onnx file that was given.

    tapped         the artifact's answers with what its layers read, with which the twin's then go on at each layer
    not_compared   why there is nothing to hold against each other
    """

    steps: Sequence[Call] = ()
    answers: Answers = field(default_factory=dict)
    references: Known = field(default_factory=dict)
    original: Ending | None = None
    tapped: Answers = field(default_factory=dict)
    not_compared: str = ""
    peak_kb: int = 0


def ask(subject: Staged, known: Known, take: Callable[[], Child]) -> Heard:
    """What the artifact and its references answer; SmokeError for an artifact that does not run.

    known   the answers of references that earlier targets had
    take    gives the process
    """
    if not subject.on_cpu and not runs_here(subject.graph):
        return Heard(not_compared="its branches, loops and sequences run in an engine alone")
    llm = subject.llm
    missing = [each for each in subject.references if each not in known]
    endings = {each.form: Ending(known[each]) for each in subject.references if each in known}
    with ExitStack() as stack:
        orders = orders_of(subject, missing, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twin."))))
        feeds = fed(subject.steps, prompts_of(llm) if llm is not None else None)
        process = stack.enter_context(started(list(orders.values()), feeds, take)) if orders else None
        here = [each for each in missing if each.form not in orders] if subject.on_cpu else []
        tapped = process.early(list(orders).index("tapped")) if process is not None and subject.by_layer else {}
        endings |= evaluated(here, subject, subject.steps, tapped)
        endings |= zip(orders, process.outcomes() if process is not None else (), strict=True)
        if subject.by_layer and not tapped and endings["artifact"].during == LOADING[0]:  # the child had ended before
            endings["artifact"] = endings["tapped"]
    endings |= {} if subject.on_cpu else of_graph(subject, endings, missing)
    artifact = endings["artifact"]
    if subject.on_cpu:
        check_taken(subject, endings)
    steps = [step for step in subject.steps if llm is not None or step.name in artifact.answers]
    if not steps:
        tried = f"it takes none of the random inputs that were tried: {artifact.failed}"
        return Heard(not_compared=tried if subject.steps else "its inputs are too large to make up")
    references = {each: endings[each.form].answers for each in subject.references}
    return Heard(steps, artifact.answers, references, endings.get("original"), tapped, peak_kb=artifact.peak_kb)


def orders_of(subject: Staged, references: Iterable[Reference], folder: Path) -> dict[str, ModelOrder]:
    """Form -> its file and what to run of it. References that cannot be evaluated here are written into `folder`."""
    calls = tuple((step.name, step.after) for step in subject.steps)
    attempts = subject.llm is None
    orders: dict[str, ModelOrder] = {}
    if subject.by_layer:  # first: the twin goes on with its answers
        file = folder / "tapped.onnx"
        file.write_bytes(tapped_model(subject))
        orders["tapped"] = ModelOrder(
            str(file), calls, "tapped", str(subject.file.parent), attempts=attempts, libraries=subject.libraries
        )
    orders |= {"artifact": order_of_artifact(subject, calls)} if subject.on_cpu else {}
    for each in references:
        if subject.on_cpu and not runs_here(each.graph):
            file = folder / f"{each.form}.onnx"
            write_model(each.graph.copy(), file)
            orders[each.form] = ModelOrder(str(file), calls, each.form, attempts=attempts)
    if subject.original is not None:
        orders["original"] = ModelOrder(str(subject.original), calls, "original", attempts=attempts)
    return orders


def tapped_model(subject: Staged) -> bytes:
    """The artifact without its weights, which also delivers what its linear layers read."""
    model = onnx.load_model(subject.file, load_external_data=False)
    made = {name for node in model.graph.node for name in node.output} - {t.name for t in model.graph.output}
    read = dict.fromkeys(layer.x for layer in layers_of(None, subject.twin.graph))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in read if name in made)
    return bytes(model.SerializeToString())


def order_of_artifact(subject: Staged, calls: tuple[tuple[str, str], ...]) -> ModelOrder:
    """Rows that decode do so in the cache of the runtime's engine, where the model is one for it."""
    llm, file = subject.llm, str(subject.file)
    inputs = {t.name for t in subject.graph.inputs if not t.name.startswith(PAST)}
    if llm is None or inputs != set(llm.input_names()) - set(llm.cache_names("past_key_values")):
        return ModelOrder(file, calls, attempts=llm is None, libraries=subject.libraries)
    own = tuple((name, after) for name, after in calls if not name.startswith(BY_ROW))
    return ModelOrder(file, own, cache=str(subject.artifact.limits.get("cache", "")), libraries=subject.libraries)


def evaluated(
    references: Iterable[Reference], subject: Staged, steps: Sequence[Call], tapped: Answers | None = None
) -> dict[str, Ending]:
    return {
        r.form: answered(r.graph, subject, steps, dict(r.blocks), tapped if r.form == "twin" else None)
        for r in references
    }


def answered(
    graph: gs.Graph,
    subject: Staged,
    steps: Sequence[Call],
    blocks: Mapping[str, int] | None = None,
    tapped: Answers | None = None,
) -> Ending:
    """What a graph answers that is evaluated here: to every step, or to the first that it takes if it is no LLM."""
    given = [typed(step, graph) for step in steps]
    if subject.llm is not None:
        return Ending(lockstep(graph, given, blocks, tapped))
    last = ""
    for step in given:
        try:
            return Ending(lockstep(graph, [step], blocks, tapped))
        except Exception as error:  # of NumPy, or of ONNX Runtime
            last = first_line(error)
    return Ending(failed=last)


def of_graph(subject: Staged, endings: Mapping[str, Ending], references: Sequence[Reference]) -> dict[str, Ending]:
    """The answers of a graph for a GPU and of its references, to what the .onnx file took or to the first that fits.

    An LLM is asked all, so that its references can be evaluated beside it, in a copy of this process.
    """
    original = endings["original"].answers if "original" in endings else {}
    steps = [step for step in subject.steps if step.name in original] or subject.steps
    if subject.llm is not None and references:
        with suppress(EOFError, TimeoutError):  # of the copy, without which it takes longer
            others, artifact = apart(
                lambda: evaluated(references, subject, steps), lambda: answered(subject.graph, subject, steps)
            )
            return {"artifact": artifact} | others
    artifact = answered(subject.graph, subject, steps)
    steps = [step for step in subject.steps if step.name in artifact.answers]
    return {"artifact": artifact} | evaluated(references, subject, steps)


def check_taken(subject: Staged, endings: Mapping[str, Ending]) -> None:
    """SmokeError where the artifact alone refuses inputs that every form took, or where it cannot be loaded."""
    artifact = endings["artifact"]
    took = next(iter(artifact.answers), "")
    others = {next(iter(each.answers)) for each in endings.values() if each.answers} - {took}
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
    for form, ending in endings.items():
        if took and ending.failed and form != "original":
            raise SmokeError(f"the {form} does not run", where=subject.artifact.path, found=ending.failed)
