"""Whether ONNX Runtime's CPU provider can run each node of a graph, asked of the installed ONNX Runtime itself.

A node runs where a kernel is registered for its operator, at the version that the graph's opset gives it, for its
types; or where the operator is a function of others that run. Versions differ: ONNX Runtime 1.32 has RoiAlign and the
random generators at opset 21 and not at 22 (docs/facts.md, "Kernels by opset"). For an Arm CPU this
machine's ONNX Runtime is asked: the registry is the same code everywhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from instantrt.compiler.frontend.model import OPSET
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import view_of
from instantrt.passes.core.rewrite import set_opset
from instantrt.plugins.ops import DOMAIN

SAME = 21  # from here to OPSET, versions of an operator take more types and attributes, and mean the same
OPEN = 2**31 - 1  # the last version of a kernel that is registered for the newest
SHOWN = 4
Types = Mapping[str, str]  # a tensor's name, or an operator's name of a type -> `tensor(float)`


@dataclass(frozen=True)
class Lack:
    """A node that cannot run, the operator's version that the graph asks for, and its types by the operator's names."""

    node: gs.Node
    version: int | None
    types: Types

    def __str__(self) -> str:
        types = ", ".join(dict.fromkeys(self.types.values()))
        what = f"version {self.version} for {types}" if self.version else "which it does not know"
        return f"{self.node.name or self.node.outputs[0].name}: {name_of(self.node)}, {what}"

    @property
    def way_out(self) -> str:
        known = kernels()[key(self.node)]
        same = [k for k in known if self.version and at_version(k, self.version)]
        if same:
            taken = sorted({t for k in same for types in k.type_constraints.values() for t in types})
            return f"cast around {self.node.op} in the model: it has kernels for {', '.join(taken)}"
        if known:
            return f"express {self.node.op} in other operators: its kernels are of other opsets than this graph needs"
        return f"express {self.node.op} in other operators before the export"


def opset_with_kernels(graph: gs.Graph) -> int | None:
    """The newest opset, the graph's own or before, at which all of its nodes run.

    Opsets from SAME to OPSET differ in types and attributes only: what a graph says, it says at each that takes it.
    """
    opsets = range(graph.opset, SAME - 1, -1) if graph.opset <= OPSET else [graph.opset]
    return next((opset for opset in opsets if not lacks(graph, opset)), None)


def with_kernels(graph: gs.Graph) -> gs.Graph | None:
    """The graph at that opset; None where there is none, and the graph stays as it is."""
    opset = opset_with_kernels(graph)
    if opset is None:
        return None
    if opset != graph.opset:
        set_opset(graph, opset)
    return graph


def refuse_lacking(graph: gs.Graph) -> None:
    """A UserError where a node cannot run."""
    lacking = lacks(graph, graph.opset)
    if not lacking:
        return
    names = "".join(f"\n    {lack}" for lack in lacking[:SHOWN])
    raise UserError(
        "ONNX Runtime's CPU provider has no kernel for this graph",
        expected=f"operators that ONNX Runtime {ort.__version__} has at opset {graph.opset}, for their types",
        found=names + (f"\n    and {len(lacking) - SHOWN} more" if lacking[SHOWN:] else ""),
        fix="; ".join(dict.fromkeys(lack.way_out for lack in lacking[:SHOWN])),
    )


def lacks(graph: gs.Graph, opset: int, outer: Types | None = None) -> list[Lack]:
    """The nodes, those of branches and bodies included, that cannot run were the graph of `opset`."""
    types = {**(outer or {}), **{t.name: kind for t in graph.inputs if (kind := type_of(t))}}
    found = []
    for node in graph.nodes:
        if node.domain == DOMAIN:  # its library brings the kernel
            continue
        schema = schema_of(key(node), opset)
        if schema is None:
            found.append(Lack(node, None, {}))
            continue
        given = tuple((types.get(t.name) or type_of(t)) if t.name else "" for t in node.inputs)
        made = tuple(type_of(t) for t in node.outputs)
        bound, outputs, registered = judge(schema, given, made)
        types |= {t.name: kind for t, kind in zip(node.outputs, outputs, strict=False) if kind}
        if not fits(node, schema) or not (registered or loads(node, opset, types)):
            found.append(Lack(node, schema.since_version, bound))
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                found += lacks(value, opset, types)
    return found


@cache
def kernels() -> Mapping[tuple[str, str], list[Any]]:
    """The kernels that are registered for the CPU provider, by domain and operator."""
    found = defaultdict(list)
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            found[kernel.domain, kernel.op_name].append(kernel)
    return found


@cache
def schemas() -> Mapping[tuple[str, str], list[Any]]:
    """Every version of every operator that ONNX Runtime knows."""
    found = defaultdict(list)
    for schema in state.get_all_operator_schema():
        found[schema.domain, schema.name].append(schema)
    return found


def key(node: gs.Node) -> tuple[str, str]:
    return ("" if node.domain in (None, "ai.onnx") else node.domain, node.op)


def name_of(node: gs.Node) -> str:
    return "::".join(part for part in key(node) if part)


@cache
def schema_of(operator: tuple[str, str], opset: int) -> Any:
    """What the operator is at `opset`; of a domain of its own there is one version."""
    known = [s for s in schemas()[operator] if s.since_version <= opset or operator[0]]
    return max(known, key=lambda s: s.since_version, default=None)


def fits(node: gs.Node, schema: Any) -> bool:
    """Does this version have what the node says?"""
    return len(node.inputs) <= schema.max_input and set(node.attrs) <= set(schema.attributes)


def at_version(kernel: Any, version: int) -> bool:
    """ONNX Runtime's own rule: an open range is for the version that it begins with alone."""
    first: int
    last: int
    first, last = kernel.version_range
    return first == version or (first < version <= last and last != OPEN)


def has_kernel(schema: Any, bound: Types) -> bool:
    return schema.name == "Constant" or any(
        at_version(kernel, schema.since_version)
        and all(bound.get(name, types[0]) in types for name, types in kernel.type_constraints.items() if types)
        for kernel in kernels()[schema.domain, schema.name]
    )


def type_of(tensor: gs.Tensor) -> str:
    """`tensor(float)`; nothing where it is not known."""
    view = view_of(tensor)
    return name_of_type(view.dtype if view is not None else tensor.dtype)


@cache
def name_of_type(dtype: Any) -> str:
    try:
        kind = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    except (KeyError, TypeError, ValueError):
        return ""
    return f"tensor({onnx.TensorProto.DataType.Name(kind).lower()})" if dtype is not None else ""


def formals(given: Sequence[str], declared: list[Any]) -> Iterator[tuple[str, Any]]:
    """The type of each of a node's tensors with what the operator declares for it; the last may stand for many."""
    for index, kind in enumerate(given if declared else ()):
        yield kind, declared[min(index, len(declared) - 1)]


@cache  # a model has thousands of nodes of a few kinds
def judge(schema: Any, given: tuple[str, ...], made: tuple[str, ...]) -> tuple[Types, tuple[str, ...], bool]:
    """Of a node whose inputs and outputs have these types, "" where that is not known: what the operator's names of
    types and of inputs are, the type of each output that follows or is known anyway, and whether a kernel is there.
    """
    bound: dict[str, str] = {}
    for kind, formal in formals(given, schema.inputs):
        if formal.isHomogeneous and kind in formal.types:  # graphsurgeon has sequences as tensors
            bound[formal.typeStr] = bound[formal.name] = kind
    for kind, formal in formals(made, schema.outputs):
        if formal.isHomogeneous and kind in formal.types:
            bound.setdefault(formal.typeStr, kind)
    outputs = []
    for kind, formal in formals(made, schema.outputs):
        (only, *others) = formal.types
        found = bound.get(formal.typeStr, "") if formal.isHomogeneous else kind
        outputs.append(found if others else only)
    return bound, tuple(outputs), has_kernel(schema, bound)


def loads(node: gs.Node, opset: int, types: Types) -> bool:
    """Does a session of this node alone load? Functions are judged by it: all operators in their bodies have to run."""
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return onnx.defs.has(node.op) and not node.domain  # a function of its body, whose nodes are looked at apart
    inputs: list[gs.Tensor] = []
    for t in node.inputs:
        kind = (types.get(t.name) or type_of(t)).removeprefix("tensor(").removesuffix(")") or "float"
        small = isinstance(t, gs.Constant) and view_of(t) is None
        if kind.upper() not in onnx.TensorProto.DataType.keys():  # noqa: SIM118  (a protobuf's enumeration)
            return False
        number = onnx.TensorProto.DataType.Value(kind.upper())
        inputs.append(t if small or not t.name else gs.Variable(t.name, number, t.shape))
    single = gs.Node(node.op, node.name, dict(node.attrs), inputs, [gs.Variable(t.name) for t in node.outputs])
    single.domain = node.domain
    fed = list({t.name: t for t in inputs if isinstance(t, gs.Variable) and t.name}.values())
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        model = gs.export_onnx(gs.Graph([single], fed, single.outputs, opset=opset), do_type_check=False)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's errors have no common class
        return False
    return True
