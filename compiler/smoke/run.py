"""Runs every artifact of a plan, where it is staged, and holds it against the twin; the first wrong one is an error."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bisect import AS_ROUGH
from instantrt.compiler.accuracy.bounds import Bound, bound_of, int8_block
from instantrt.compiler.accuracy.engine_runner import EngineRunner
from instantrt.compiler.accuracy.subjects import all_positions
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend import onnx_file
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request
from instantrt.compiler.smoke import original
from instantrt.compiler.smoke.compare import Distance, distances, moved, not_finite
from instantrt.compiler.smoke.explain import Looker, roughness, too_coarse
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.on_gpu import engine_answers, why_not
from instantrt.compiler.smoke.process import LOADING, Answers, Ending, ModelOrder, Process
from instantrt.compiler.smoke.steps import CACHED, Call, attempts, fed, llm_steps, plain, prompts_of, row_steps, typed
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, view_of
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.core.subgraphs import tensors
from instantrt.passes.ort.tables import QuantizeTables
from instantrt.passes.tensorrt.lower_native_tables import LowerNativeTables

SMALL = 64 << 20  # bytes of a twin's float32 weights: it is written and run beside the artifact; a larger one streams
BY_ROW = ("decode 1", "decode 2", "row")  # steps that an engine of the runtime does in its own cache
Twins = dict[tuple[object, ...], tuple[Answers, str]]


class SmokeError(UserError):
    """An artifact that does not run, or is not what it was made of. Nothing was written."""


@dataclass(frozen=True)
class Ran:
    """One target: its answer that came closest to the bound, and what else there is to say."""

    target: str
    distance: Distance
    bound: Bound
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    peak_kb: int = 0

    def __str__(self) -> str:
        d = self.distance
        if not d.step:
            return "\n  ".join((f"{self.target}: ran", *self.notes))
        if not d.relative:
            return "\n  ".join((f"{self.target}: ran; no difference from the twin", *self.notes))
        how = f"largest error {d.largest:.0e} of {d.of:.2g}; relative {d.relative:.0e}, bound {self.bound.model:.0e}"
        return f"{self.target}: ran; {how} ({self.bound.name})" + "".join(f"\n  {note}" for note in self.notes)


@dataclass
class Smoke:
    """All targets of one plan. `request.out` is where the artifacts are staged; twins that targets share run once."""

    planned: Plan
    request: Request
    twins: Twins = field(default_factory=dict)

    def target(self, target: Target, artifact: Artifact) -> Ran:
        started = time.monotonic()
        subject = Staged(self.planned, self.request, target, artifact)
        ran = subject.in_process(self.twins) if artifact.kind == "onnx" else subject.evaluated(self.twins)
        return replace(ran, seconds=time.monotonic() - started)


def smoke(planned: Plan, request: Request, artifacts: Sequence[Artifact]) -> Iterator[Ran]:
    """What became of each artifact, as it is known; SmokeError for one that is wrong."""
    every = Smoke(planned, request)
    for target, artifact in zip(request.resolved_targets(), artifacts, strict=True):
        yield every.target(target, artifact)


@dataclass
class Staged:
    """One artifact, and what it is held against."""

    planned: Plan
    request: Request
    made_for: Target
    artifact: Artifact

    def __post_init__(self) -> None:
        name = self.made_for.name
        self.lowered = self.planned.lowered[name]
        self.dtype = self.planned.types.get(name, FLOAT32)
        self.bound = bound_of(self.lowered.nodes, self.dtype)
        self.blocks = {n.name: b for n in self.lowered.nodes if (b := int8_block([n])) is not None}
        self.reference = self.planned.twins[name].canonical
        if self.request.embeddings == "int8":  # tables are rounded as they are lowered: no error of the lowering
            table = QuantizeTables() if artifact_runs(self.artifact) else LowerNativeTables(self.dtype)
            self.reference = run(self.reference.copy(), [table], PassLog())
        self.file = self.request.out / self.artifact.path

    @property
    def steps(self) -> list[Call]:
        llm = self.planned.model.llm
        if llm is None:
            return list(attempts(self.reference.inputs))
        return llm_steps(self.reference, llm, right=artifact_runs(self.artifact)) + row_steps(self.reference, llm)

    # An artifact for a CPU

    def in_process(self, twins: Twins) -> Ran:
        """The file in a fresh process; the twin in the same one where it is small, else meanwhile in this one."""
        steps, llm, model = self.steps, self.planned.model.llm, self.request.model
        calls = tuple((s.name, s.after) for s in steps)
        engine = llm is not None and {t.name for t in self.lowered.inputs} == set(llm.input_names())
        own = tuple((n, a) for n, a in calls if not engine or not n.startswith(BY_ROW))
        cache = str(self.artifact.limits.get("cache", "")) if engine else ""
        orders = {"artifact": ModelOrder(str(self.file), own, cache, attempts=llm is None)}
        every = list(steps)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twin.")))
            for form, graph in self.references.items():
                if self.key(form) not in twins and not self.streams(graph):
                    write_model(graph.copy(), folder / f"{form}.onnx")
                    file = str(folder / f"{form}.onnx")
                    orders[form] = ModelOrder(file, calls, as_written=True, attempts=llm is None)
            if model.suffix == ".onnx":
                orders["original"] = original.order(model, steps, attempts=llm is None)
                every += original.in_its_types(model, steps)
            prompts = prompts_of(llm) if engine and llm is not None else None
            process = stack.enter_context(Process(list(orders.values()), fed(every, prompts)))
            if llm is not None:
                self.stream(twins, orders, steps)
            outcomes = dict(zip(orders, process.outcomes(), strict=True))
        artifact = outcomes["artifact"]
        if llm is None:
            chosen = self.agreed(outcomes, steps)
            if chosen is None:
                return self.not_compared(none_taken(artifact.refused))
            steps = [chosen]
            self.stream(twins, orders, steps)
        self.check_ran(artifact)
        for form in self.references:
            if form in outcomes:
                if outcomes[form].failed:
                    raise SmokeError(f"the {form} does not run", where=self.artifact.path, found=outcomes[form].failed)
                twins[self.key(form)] = (outcomes[form].answers, "")
        if operator := original.draws(self.reference):
            return self.not_compared(f"{operator} makes every run another one", artifact.peak_kb)
        expected, first_bad = twins[self.key("twin")]
        notes = self.held_against_original(outcomes, twins, steps)
        expected = expected | cached(expected, artifact.answers)
        ran = self.judge(artifact.answers, expected, steps, first_bad)
        return replace(ran, notes=(*notes, *ran.notes), peak_kb=artifact.peak_kb)

    @property
    def references(self) -> dict[str, gs.Graph]:
        """The twin; where that is quantized, what the .onnx file was read as, too."""
        if self.request.model.suffix != ".onnx" or not self.planned.twins[self.made_for.name].quantized:
            return {"twin": self.reference}
        return {"twin": self.reference, "float": self.planned.model.graph}

    def key(self, form: str) -> tuple[object, ...]:
        """What the answers of a form depend on."""
        twin = id(self.planned.twins[self.made_for.name])
        return (form, twin, artifact_runs(self.artifact), *sorted(self.blocks.items()))

    def streams(self, graph: gs.Graph) -> bool:
        """Is a graph evaluated here? One with branches or loops is not: ONNX Runtime alone runs those."""
        if any(True for _ in graph.subgraphs()):
            return False
        return bool(self.blocks) or weight_bytes(graph) > SMALL

    def stream(self, twins: Twins, orders: Mapping[str, ModelOrder], steps: Sequence[Call]) -> None:
        """Evaluates what the process was not asked for."""
        for form, graph in self.references.items():
            if form not in orders and self.key(form) not in twins:
                twins[self.key(form)] = lockstep(graph, steps, self.blocks if form == "twin" else None)

    def agreed(self, outcomes: Mapping[str, Ending], steps: Sequence[Call]) -> Call | None:
        """The inputs that every form took; SmokeError where the artifact alone refuses some."""
        if not steps:
            self.check_ran(outcomes["artifact"])
            return None
        took = {form: next(iter(original.by_step(o.answers)), None) for form, o in outcomes.items()}
        others = [name for form, name in took.items() if form != "artifact" and name is not None]
        mine, artifact = took["artifact"], outcomes["artifact"]
        names = [step.name for step in steps]
        if artifact.during in LOADING or (others and (mine is None or mine not in others)):
            why = artifact.failed or artifact.refused
            self.check_ran(replace(artifact, failed=why or f"it takes {mine}, and the model {others[0]}"))
        return steps[names.index(mine)] if mine is not None else None

    def held_against_original(
        self, outcomes: Mapping[str, Ending], twins: Twins, steps: Sequence[Call]
    ) -> tuple[str, ...]:
        """Is what was compiled the graph of the file? A note where ONNX Runtime cannot say so."""
        outcome = outcomes.get("original")
        if outcome is None:
            return ()
        found = original.by_step(outcome.answers)
        why = outcome.failed or ("" if found else outcome.refused)
        if why:
            return (f"the .onnx file itself was not run: ONNX Runtime {ort_version()}: {first_line(why)}",)
        form = "float" if "float" in self.references else "twin"
        expected, bound = twins[self.key(form)][0], original.arithmetic(self.request.model)
        wrong = [d for d in distances(found, expected, steps) if not d.within(bound.model)]
        rough = roughness(self.references[form], expected, steps) if wrong else {}
        for each in wrong:
            if not each.relative <= AS_ROUGH * rough.get((each.step, each.output), 0.0):
                raise SmokeError(
                    "what was compiled does not compute what the .onnx file does",
                    where=str(self.request.model),
                    expected=f"its outputs by ONNX Runtime {ort_version()}, within {bound.model:.0e} ({bound.name})",
                    found=f"{each.output} " + (each.odd or f"is off by {each.relative:.1e} of its size"),
                    fix="export it at a newer opset; please report this with the file",
                )
        return ()

    def check_ran(self, outcome: Ending) -> None:
        if outcome.failed:
            loading = outcome.during in LOADING
            raise SmokeError(
                "the artifact cannot be loaded" if loading else f"the artifact does not run: {outcome.during}",
                where=self.artifact.path,
                expected=f"a model that ONNX Runtime {ort_version()} runs",
                found=outcome.failed,
                fix="a newer onnxruntime, --portable where an operator of attention is named; else please report this",
            )

    # An engine or kit

    def evaluated(self, twins: Twins) -> Ran:
        """The lowered graph, on this CPU."""
        steps, graph, llm, key = self.steps, self.lowered, self.planned.model.llm, self.key("twin")
        if self.artifact.limits.get("cache") == "shared":
            graph = self.lowered = all_positions(self.planned, self.request, self.made_for, PassLog())
        lacking = why_not(self.artifact)
        notes = [f"what ran is the lowered graph, on this CPU; {lacking}"] if lacking else []
        if any(True for _ in graph.subgraphs()):
            return self.not_compared("its branches and loops run in an engine alone")
        outcomes = self.original_alone(steps)
        if llm is None:
            chosen, why = first_that_runs(graph, steps, outcomes)
            if chosen is None:
                return self.not_compared(none_taken(why))
            steps = [chosen]
        self.stream(twins, {}, steps)
        if operator := original.draws(self.reference):
            return self.not_compared(f"{operator} makes every run another one")
        notes += self.held_against_original(outcomes, twins, steps)
        expected, first_bad = twins[key]
        found, _ = lockstep(graph, [typed(step, graph) for step in steps])
        ran = self.judge(found, expected, steps, first_bad)
        if not lacking:
            libraries = [self.request.out / name for name in self.artifact.plugins]
            names = [t.name for t in graph.outputs]
            engine = engine_answers(EngineRunner(self.file, libraries, names, every_position=False), steps)
            ran = self.judge(engine, expected, steps, first_bad)
        return replace(ran, notes=(*ran.notes, *notes))

    def original_alone(self, steps: Sequence[Call]) -> dict[str, Ending]:
        """The .onnx file in a process of its own; nothing where no such file was given."""
        model = self.request.model
        if model.suffix != ".onnx":
            return {}
        order = original.order(model, steps, attempts=self.planned.model.llm is None)
        with Process([order], fed(original.in_its_types(model, steps))) as process:
            return {"original": process.outcomes()[0]}

    def not_compared(self, why: str, peak_kb: int = 0) -> Ran:
        return Ran(self.made_for.name, Distance("", ""), self.bound, (f"not compared: {why}",), peak_kb=peak_kb)

    # What came out

    def judge(self, found: Answers, expected: Answers, steps: Sequence[Call], first_bad: str) -> Ran:
        bad = not_finite(expected, steps, every=self.planned.model.llm is None)
        if bad is not None:
            with suppress(Exception):  # ONNX Runtime ran the twin, and did not say; not every graph can be asked here
                first_bad = first_bad or lockstep(self.reference, steps)[1]
            raise SmokeError(
                "the model itself gives values that are not finite",
                where=f"{bad[1]}, {bad[0]}",
                found=f"the first tensor that has some is {first_bad}" if first_bad else "",
                fix="look at the checkpoint's weights; --no-smoke writes the artifact all the same",
            )
        every = list(distances(found, expected, steps))
        wrong = [each for each in every if not each.within(self.bound.model)]
        worst = max(every, key=lambda d: d.relative, default=Distance("", ""))
        if not wrong:
            return Ran(self.made_for.name, worst, self.bound)
        note = self.explain(wrong, found, expected, steps)
        return Ran(self.made_for.name, worst, self.bound, (note,))

    def explain(self, wrong: Sequence[Distance], found: Answers, expected: Answers, steps: Sequence[Call]) -> str:
        """Why what is beyond the bound is no error all the same; SmokeError where it is one."""
        first = wrong[0]
        graph = onnx_file.artifact_graph(self.file) if artifact_runs(self.artifact) else self.lowered
        looker = Looker(self.planned, self.request, self.made_for, self.reference, graph, self.dtype)
        why = looker.why(wrong, expected, steps)
        if not why:
            return (
                f"{shown(first.step)}: {first.output} {first.odd or f'is {first.relative:.0e} from the twin'}. "
                "No layer is beyond its bound: the model amplifies rounding"
            )
        off = first.odd or f"is off by {first.relative:.1e} of its size"
        coarse = why == too_coarse(self.dtype)
        raise SmokeError(
            f"the artifact for {self.made_for.name} does not compute what the model does: {shown(first.step)}",
            where=self.artifact.path,
            expected=f"{first.output} of the twin, within {self.bound.model:.0e} ({self.bound.name})",
            found="; ".join(filter(None, (f"{first.output} {off}", causality(found, expected), why))),
            fix=("compile it for a CPU, which computes in float32" if coarse else "please report this")
            + "; --no-smoke writes the artifact as it is, for a look with instantrt diff --bisect",
        )


def artifact_runs(artifact: Artifact) -> bool:
    return artifact.kind == "onnx"


def shown(step: str) -> str:
    return f"{plain(step)} of two rows in the cache" if step.startswith(CACHED) else step


def cached(expected: Answers, found: Answers) -> Answers:
    """What a batch of both rows must answer: each row by itself."""
    made: Answers = {}
    for step in (name for name in found if name.startswith(CACHED)):
        index = int(step.removeprefix(CACHED))
        names = (f"decode {index}", f"row {index}") if index else ("prefill", "row")
        made[step] = {"logits": np.concatenate([expected[name]["logits"][:, -1] for name in names])}
    return made


def causality(found: Answers, expected: Answers) -> str:
    """Whether the first token sees the last one, where the two disagree about it."""
    sees, should = moved(found), moved(expected, like=found)
    if sees is None or should is None or sees == should:
        return ""
    words = ("does not see the last one", "sees the last one")
    return f"causality: the model's first token {words[should]}, the artifact's {words[sees]}"


def first_that_runs(graph: gs.Graph, steps: Sequence[Call], outcomes: Mapping[str, Ending]) -> tuple[Call | None, str]:
    """The inputs that the .onnx file took, or else the first that `graph` takes; why none is one."""
    took = [name for outcome in outcomes.values() for name in original.by_step(outcome.answers)]
    last = ""
    for step in [s for s in steps if s.name in took] or steps:
        try:
            lockstep(graph, [typed(step, graph)])
        except Exception as error:  # of NumPy, or of ONNX Runtime
            last = first_line(str(error))
            continue
        return step, ""
    return None, last


def none_taken(why: str) -> str:
    return (
        f"it takes none of the random inputs that were tried: {why}" if why else "its inputs are too large to make up"
    )


def weight_bytes(graph: gs.Graph) -> int:
    """Of its weights as float32."""
    return 4 * sum(int(math.prod(t.shape)) for t in tensors(graph).values() if view_of(t) is not None)


def first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def ort_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
