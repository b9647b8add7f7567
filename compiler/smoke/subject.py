"""What is run, and what it is held against."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bounds import BETWEEN, Bound, bound_of, int8_block
from instantrt.compiler.accuracy.subjects import all_positions
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.frontend.model import LlmShape
from instantrt.compiler.plan import Plan, longest
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.compiler.smoke.steps import Call, steps_of
from instantrt.compiler.target import Target
from instantrt.passes.core.lazy import FLOAT32
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.qdq.join_linears import parts_of
from instantrt.passes.tensorrt.lower_native_tables import LowerNativeTables

NO_TENSORS = ("Sequence", "Optional", "Map")  # in the names of the operators that make or read something else


@dataclass(frozen=True)
class Reference:
    """A graph that answers are held against: the twin, or `float`, what an .onnx file was read as before that.

    made_of   equal where two targets have the same one, of which they ask the same
    blocks    MatMul -> the block in which the operator that stands for it makes int8 of its input, by definition
    """

    form: str
    graph: gs.Graph = field(compare=False)
    made_of: tuple[object, ...]
    blocks: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Staged:
    """One artifact where it is staged, in `request.out`.

    graph        what it was written from; of one for a GPU a form that this CPU can evaluate
    references   the twin; after it what the .onnx file was read as, where that is another graph
    dtype        what it computes in, and how far that may be from the twin: `bound`
    steps        what all are asked; without an interface of an LLM, inputs of which the first will do that all take
    say          whom it tells what takes long
    """

    planned: Plan
    request: Request
    target: Target
    artifact: Artifact
    graph: gs.Graph
    references: tuple[Reference, ...]
    dtype: np.dtype[np.generic]
    bound: Bound
    steps: tuple[Call, ...]
    say: Say

    @property
    def llm(self) -> LlmShape | None:
        return llm_of(self.planned, self.request)

    @property
    def by_layer(self) -> bool:
        """Is each layer held against the twin's on one input? Where activations become integers at run time, a
        difference in the last bit grows to a whole step, and from there layer by layer: answers alone prove little."""
        return self.on_cpu and self.bound in BETWEEN and runs_here(self.twin.graph)

    @property
    def file(self) -> Path:
        return self.request.out / self.artifact.path

    @property
    def libraries(self) -> tuple[str, ...]:
        """Of operators of ours, where the artifact has some: they lie beside it."""
        return tuple(str(self.request.out / name) for name in self.artifact.plugins)

    @property
    def on_cpu(self) -> bool:
        return self.artifact.kind == "onnx"

    @property
    def twin(self) -> Reference:
        return self.references[0]

    @property
    def original(self) -> Path | None:
        """The .onnx file that was given; `references[-1]` is what it was read as."""
        return self.request.model if self.request.model.suffix == ".onnx" else None


def staged(planned: Plan, request: Request, target: Target, artifact: Artifact, say: Say) -> Staged:
    graph, on_cpu = planned.lowered[target.name], artifact.kind == "onnx"
    dtype = planned.types.get(target.name, FLOAT32)
    twin = twin_of(planned, request, target, on_cpu=on_cpu)
    references = [twin]
    if request.model.suffix == ".onnx" and planned.twins[target.name].quantized:
        floating = planned.model.graph
        references.append(Reference("float", floating, (id(floating), on_cpu)))
    llm = llm_of(planned, request)
    steps = steps_of(twin.graph, llm or planned.model.encoder, right=on_cpu)
    bound = bound_of(graph.nodes, dtype)
    if not on_cpu and artifact.limits.get("cache") == "shared":
        graph = all_positions(planned, request, target, PassLog())
    return Staged(planned, request, target, artifact, graph, tuple(references), dtype, bound, tuple(steps), say)


def llm_of(planned: Plan, request: Request) -> LlmShape | None:
    """The interface of an LLM, for as many tokens as its artifacts take."""
    llm = planned.model.llm
    return replace(llm, max_length=longest(request, planned.model)) if llm is not None else None


def twin_of(planned: Plan, request: Request, target: Target, *, on_cpu: bool) -> Reference:
    """With an engine's tables rounded as they are lowered: that is no error of the lowering."""
    # On a CPU the twin goes on with what the artifact's layers read, which has other bits on kernels of ours.
    library = request.library(target) if on_cpu else None
    graph, made_of = planned.twins[target.name].canonical, (id(planned.twins[target.name]), on_cpu, library, "")
    if request.embeddings == "int8" and not on_cpu:
        table = LowerNativeTables(planned.types[target.name])
        graph, made_of = run(graph.copy(), [table], PassLog()), (*made_of[:3], repr(table))
    blocks = ((n.name, block) for n in planned.lowered[target.name].nodes if (block := int8_block([n])) is not None)
    each = ((part, block) for name, block in blocks for part in parts_of(name))
    return Reference("twin", graph, made_of, tuple(sorted(each)))


def runs_here(graph: gs.Graph) -> bool:
    """Can it be evaluated node by node, on tensors alone? ONNX Runtime alone runs branches, loops and sequences."""
    branches = any(True for _ in graph.subgraphs())
    return not branches and not any(word in node.op for node in graph.nodes for word in NO_TENSORS)
