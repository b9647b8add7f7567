"""Runs every artifact of a plan, where it is staged, and holds it against the twin; the first wrong one is an error."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bisect import BisectingLog, bisect
from instantrt.compiler.accuracy.bounds import Bound, bound_of, int8_block
from instantrt.compiler.accuracy.subjects import all_positions
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.gpu import describe
from instantrt.compiler.frontend import onnx_file
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request
from instantrt.compiler.smoke.compare import Distance, distances, moved, not_finite
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.process import Answers, Order, Outcome, Process
from instantrt.compiler.smoke.steps import Step, attempts, llm_steps, prompts_of, row_steps
from instantrt.compiler.target import Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FLOAT32, Array, view_of
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.core.subgraphs import tensors
from instantrt.passes.ort.tables import QuantizeTables
from instantrt.passes.tensorrt.lower_native_tables import LowerNativeTables

SMALL = 64 << 20  # bytes of a twin's float32 weights: it is written and run beside the artifact; a larger one streams
AS_ROUGH = 2.0  # times what its own nodes, run one by one, are away from the twin: then the model amplifies rounding
CACHED = "cached"


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
        how = f"largest error {d.largest:.0e} of {d.of:.2g}; relative {d.relative:.0e}, bound {self.bound.model:.0e}"
        return f"{self.target}: ran; {how} ({self.bound.name})" + "".join(f"\n  {note}" for note in self.notes)


@dataclass
class Smoke:
    """All targets of one plan. `request.out` is where the artifacts are staged; twins that targets share run once."""

    planned: Plan
    request: Request
    twins: dict[tuple[object, ...], tuple[Answers, str]] = field(default_factory=dict)

    def target(self, target: Target, artifact: Artifact) -> Ran:
        started = time.monotonic()
        subject = Subject(self.planned, self.request, target, artifact)
        ran = subject.in_process(self.twins) if artifact.kind == "onnx" else subject.evaluated(self.twins)
        return replace(ran, seconds=time.monotonic() - started)


def smoke(planned: Plan, request: Request, artifacts: Sequence[Artifact]) -> Iterator[Ran]:
    """What became of each artifact, as it is known; SmokeError for one that is wrong."""
    every = Smoke(planned, request)
    for target, artifact in zip(request.resolved_targets(), artifacts, strict=True):
        yield every.target(target, artifact)


@dataclass
class Subject:
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
    def steps(self) -> list[Step]:
        llm = self.planned.model.llm
        if llm is None:
            return list(attempts(self.reference.inputs))
        return llm_steps(self.reference, llm, right=artifact_runs(self.artifact)) + row_steps(self.reference, llm)

    # An artifact for a CPU

    def in_process(self, twins: dict[tuple[object, ...], tuple[Answers, str]]) -> Ran:
        """The file in a fresh process; the twin in the same one where it is small, else meanwhile in this one."""
        steps, llm = self.steps, self.planned.model.llm
        key = (id(self.planned.twins[self.made_for.name]), len(steps), *sorted(self.blocks.items()))
        calls = tuple((s.name, s.after) for s in steps)
        engine = llm is not None and {t.name for t in self.lowered.inputs} == set(llm.input_names())
        own = tuple((n, a) for n, a in calls if not engine or not n.startswith(("decode 1", "decode 2", "row")))
        cache = str(self.artifact.limits.get("cache", "")) if engine else ""
        orders = [Order(str(self.file), own, cache, attempts=llm is None)]
        streams = bool(self.blocks) or weight_bytes(self.reference) > SMALL
        with ExitStack() as stack:
            if key not in twins and not streams:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="twin.")))
                write_model(self.reference.copy(), folder / "twin.onnx")
                orders.append(Order(str(folder / "twin.onnx"), calls, as_written=True, attempts=llm is None))
            process = stack.enter_context(Process(orders, fed(steps, prompts_of(llm) if engine and llm else None)))
            if key not in twins and streams and llm is not None:
                twins[key] = lockstep(self.reference, steps, self.blocks)
            artifact, *others = process.outcomes()
        self.check_ran(artifact)
        if llm is None:
            steps = [s for s in steps if s.name in artifact.answers]
        if key not in twins:
            twins[key] = (others[0].answers, "") if others else lockstep(self.reference, steps, self.blocks)
        expected, first_bad = twins[key]
        if others and others[0].failed:
            raise SmokeError("the twin does not run", where=self.artifact.path, found=others[0].failed)
        expected = expected | cached(expected, artifact.answers)
        ran = self.judge(artifact.answers, expected, steps, first_bad)
        return replace(ran, peak_kb=artifact.peak_kb)

    def check_ran(self, outcome: Outcome) -> None:
        if outcome.failed:
            loading = outcome.during in ("load", "start")
            raise SmokeError(
                "the artifact cannot be loaded" if loading else f"the artifact does not run: {outcome.during}",
                where=self.artifact.path,
                expected=f"a model that ONNX Runtime {ort_version()} runs",
                found=outcome.failed,
                fix="a newer onnxruntime, --portable where an operator of attention is named; else please report this",
            )

    # An engine or kit

    def evaluated(self, twins: dict[tuple[object, ...], tuple[Answers, str]]) -> Ran:
        """The lowered graph, on this CPU."""
        steps, graph = self.steps, self.lowered
        if self.artifact.limits.get("cache") == "shared":
            graph = all_positions(self.planned, self.request, self.made_for, PassLog())
        key = (id(self.planned.twins[self.made_for.name]), len(steps))
        if self.planned.model.llm is None:
            steps = [first_that_runs(graph, steps)]
        if key not in twins:
            twins[key] = lockstep(self.reference, steps)
        expected, first_bad = twins[key]
        found, _ = lockstep(graph, [typed(step, graph) for step in steps])
        ran = self.judge(found, expected, steps, first_bad)
        what = "the engine" if self.artifact.kind == "engine" else "an engine"
        return replace(ran, notes=(*ran.notes, f"what ran is the lowered graph, on this CPU; {what} was not: {describe()}"))

    # What came out

    def judge(self, found: Answers, expected: Answers, steps: Sequence[Step], first_bad: str) -> Ran:
        bad = not_finite(expected, steps)
        if bad is not None:
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

    def explain(self, wrong: Sequence[Distance], found: Answers, expected: Answers, steps: Sequence[Step]) -> str:
        """Why what is beyond the bound is no error all the same; SmokeError where it is one."""
        first = wrong[0]
        step = next((s for s in steps if s.name == plain(first.step)), steps[0])
        written = onnx_file.artifact_graph(self.file) if artifact_runs(self.artifact) else None
        culprit = ""
        try:
            looked = self.look(step, expected, written)
            culprit = str(looked) if looked is not None else ""
            rough = self.roughness(written, expected, steps) if not culprit else {}
        except Exception as error:  # what could not be looked into is wrong as it is
            rough, culprit = {}, f"no layer could be named: {error}"
        if not culprit and all(d.within(AS_ROUGH * rough.get((plain(d.step), d.output), 0.0)) for d in wrong):
            return (
                f"{shown(first.step)}: {first.output} is {first.relative:.0e} from the twin. No layer is beyond its bound: the "
                "model amplifies rounding"
            )
        off = first.odd or f"{first.output} is off by {first.relative:.1e} of its size"
        raise SmokeError(
            f"the artifact for {self.made_for.name} does not compute what the model does: {shown(first.step)}",
            where=self.artifact.path,
            expected=f"{first.output} of the twin, within {self.bound.model:.0e} ({self.bound.name})",
            found="; ".join(filter(None, (off, causality(found, expected), culprit or "no single layer is wrong"))),
            fix="please report this; --no-smoke writes the artifact as it is, for a look with instantrt diff --bisect",
        )

    def look(self, step: Step, expected: Answers, written: gs.Graph | None) -> object:
        """The first pass and node that is wrong, on the inputs of one step."""
        cache = {
            f"past_key_values.{name.removeprefix('present.')}": value
            for name, value in expected.get(step.after, {}).items()
            if name.startswith("present.")
        }
        log = BisectingLog(canonical=self.reference, feeds={**step.feeds, **cache}, dtype=self.dtype, worst=False)
        lower = partial(all_positions, self.planned, self.request, self.made_for)
        if self.request.embeddings == "int8":  # tables are rounded by the last passes
            return next(log.wrong("writing the artifact", written if written is not None else lower(PassLog())), None)
        return bisect(lower, log, written)

    def roughness(
        self, written: gs.Graph | None, expected: Answers, steps: Sequence[Step]
    ) -> dict[tuple[str, str], float]:
        """How far the graph is from the twin where its nodes are run one by one."""
        graph = written if written is not None else self.lowered
        found, _ = lockstep(graph, [typed(step, graph) for step in steps])
        known = {name: outputs for name, outputs in found.items() if name in expected}
        return {(d.step, d.output): math.inf if d.odd else d.relative for d in distances(known, expected, steps)}


def artifact_runs(artifact: Artifact) -> bool:
    return artifact.kind == "onnx"


def plain(step: str) -> str:
    """The step by itself of one that a batch in the cache is held against."""
    if not step.startswith(CACHED):
        return step
    index = int(step.removeprefix(CACHED))
    return f"decode {index}" if index else "prefill"


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


def fed(steps: Sequence[Step], prompts: object) -> dict[str, Array]:
    given = {f"{step.name}|{name}": value for step in steps for name, value in step.feeds.items()}
    if prompts is not None:
        given |= {f"{CACHED}|{row}": ids for row, ids in enumerate(prompts.rows)} | {f"{CACHED}|tokens": prompts.tokens}
    return given


def typed(step: Step, graph: gs.Graph) -> Step:
    """The step in the types of `graph`."""
    types = {t.name: np.dtype(t.dtype) for t in graph.inputs}
    return replace(step, feeds={n: v.astype(types[n], copy=False) for n, v in step.feeds.items() if n in types})


def first_that_runs(graph: gs.Graph, steps: Sequence[Step]) -> Step:
    for step in steps:
        try:
            lockstep(graph, [typed(step, graph)])
        except Exception as error:
            last = error
            continue
        return step
    raise SmokeError("the graph does not run on random inputs", found=str(last))


def weight_bytes(graph: gs.Graph) -> int:
    """Of its weights as float32."""
    return 4 * sum(math.prod(t.shape) for t in tensors(graph).values() if view_of(t) is not None)


def ort_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
