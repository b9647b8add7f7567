"""Skeleton -> graph as torch exports it, its parameters graph inputs named `model.<path>`.

export_graph    few layers   -> whole model      alike.py: which layers are, repeat.py: their nodes
  export_whole  torch        -> ONNX IR          constants folded, detours removed
  finish        equal values -> one              names by module and place, whatever was exported
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from instantrt.compiler.frontend.alike import UnlikeError, find_layers, some_layers, unchanged
from instantrt.compiler.frontend.decomposed import decomposed, known_values
from instantrt.compiler.frontend.interface import dynamic, example, wrapped
from instantrt.compiler.frontend.model import OPSET, Interface, LlmShape
from instantrt.compiler.frontend.repeat import repeat_layers
from instantrt.passes.core.apart import apart

# What the exporter's decompositions leave behind in the models that are tested; all of onnxscript's rules together take
# several times as long as these.
DETOURS = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.no_op_cast_rule,
    rules.cast_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
)
FEWEST = 2  # layers that are exported where any are repeated: one, and one that proves it


@dataclass(frozen=True)
class Exported:
    """A model as exported, whose weights are graph inputs, and what a user should know of how."""

    model: onnx.ModelProto
    notes: tuple[str, ...] = ()


def export_graph(model: Any, shape: Interface) -> Exported:
    """Exports with dynamic batch, sequence, past and total; parameters come out as graph inputs.

    Layers that are alike are exported once and repeated; where that cannot be proved, the whole model is exported.
    """
    notes: tuple[str, ...] = ()
    try:
        traced = export_repeated(model, shape) if shape.layers > FEWEST else export_whole(model, shape)
    except UnlikeError as error:
        notes = (f"all {shape.layers} layers were exported, which takes longer: {error}",)
        traced = export_whole(model, shape)
    finish(traced, shape)
    return Exported(ir.to_proto(traced), notes)


def import_exporter() -> None:
    """What torch imports when something is first exported."""
    for name in ("torch.export._trace", "onnxscript.function_libs.torch_lib.ops"):
        with suppress(ImportError):  # they are its own
            import_module(name)


def export_repeated(model: Any, shape: Interface) -> ir.Model:
    """A few layers exported, and repeated; UnlikeError where they are not alike, or not as exported."""
    try:
        layers, _ = apart(lambda: find_layers(model, shape), import_exporter)
    except (EOFError, TimeoutError):
        raise UnlikeError("the process that compares its layers did not end as it should") from None
    with some_layers(model, layers.path, layers.shown) as few:
        try:
            traced = export_whole(model, shape.with_layers(few))
        except Exception as error:  # of a model that counts on all of its layers
            raise UnlikeError(f"with {few} layers alone, the export ends in {type(error).__name__}") from error
    repeat_layers(traced.graph, layers, shape)
    return traced


def export_whole(model: Any, shape: Interface) -> ir.Model:
    """As torch exports it, with constants folded, detours removed, sizes read at one place; nodes named by module."""
    # Each size of a shape that torch remembers of an operator is worked out anew where it is used again: with symbols
    # that takes longer than the operator (docs/facts.md, "What an export spends its time on").
    no_cache = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    with warnings.catch_warnings(), torch.no_grad(), unchanged(model), no_cache:
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(
            wrapped(model, shape), example(shape), dynamic_shapes=dynamic(shape), strict=False
        )
        exported = to_onnx(program, shape)
    traced = exported.model
    for name in [f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)]:
        if name in traced.graph.initializers:
            value = traced.graph.initializers.pop(name)
            value.const_value = None  # nothing may fold what was never written
            traced.graph.inputs.append(value)
    for _ in range(2):
        optimizer.fold_constants_ir(
            traced, onnx_shape_inference=True, input_size_limit=1 << 16, output_size_limit=1 << 20
        )
        RewritePass(DETOURS)(traced)
        common.RemoveUnusedNodesPass()(traced)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(traced)
    for node in traced.graph:
        node.name = module_path(node)
        read_first(node, traced.graph.inputs)
    return traced


def to_onnx(program: torch.export.ExportedProgram, shape: Interface) -> torch.onnx.ONNXProgram:
    """The program in ONNX's operators; where one has none as it is, torch decomposes all."""
    export = partial(
        torch.onnx.export,
        program,
        input_names=shape.input_names(),
        output_names=shape.output_names(),
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    program.run_decompositions = partial(decomposed, program)
    try:
        with known_values():
            exported = export()
    except (torch.onnx.OnnxExporterError, ImportError, AttributeError):  # `known_values` is of a private pass
        del program.run_decompositions
        exported = export()
    assert exported is not None
    return exported


def module_path(node: ir.Node) -> str:
    """The module that the exporter recorded on a node, without the wrapper's own prefix; "" for the wrapper itself.

    What the folding of constants made has no record: it belongs where its input comes from.
    """
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    modules = ["", *(s.removeprefix("model.") for s in scopes[:-1] if s.startswith("model."))]
    makers = (value.producer() for value in node.inputs if value is not None)
    return modules[-1] if scopes else next((maker.name or "" for maker in makers if maker is not None), "")


def finish(model: ir.Model, shape: Interface) -> None:
    """Makes the model what it is of any export: equal values are made once; names and order.

    A node is called by its module and its place there, a tensor as its maker, a constant by its place in the graph.
    """
    graph = model.graph
    order_by_use(graph)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    name_dimensions(graph, shape)
    numbers = Counter[str]()
    constants: dict[ir.Value, None] = {}
    for node in graph:
        path = node.name or ""
        node.name = f"{path}/{node.op_type}_{numbers[path]}"
        numbers[path] += 1
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"{node.name}:{value.index()}"
        constants |= {v: None for v in node.inputs if v is not None and v.const_value is not None}
    graph.initializers.clear()
    for index, value in enumerate(constants):
        if not str(value.name).startswith("model."):
            value.name = f"constant:{index}"
        graph.initializers.add(value)
    inputs = {str(value.name): value for value in graph.inputs}
    graph.inputs[:] = [inputs.pop(name) for name in shape.input_names()] + [inputs[name] for name in sorted(inputs)]
    made = (value for node in graph for value in node.outputs)
    for each in (model, graph, *graph, *graph.inputs, *made, *constants):
        each.metadata_props.clear()  # the exporter's, which name files of this machine


def order_by_use(graph: ir.Graph) -> None:
    """Each node where what the model gives first needs it, by the order of outputs and of a node's inputs.

    The exporter follows the model, which may go through a set of words: the same checkpoint would become another file
    in another process (docs/facts.md, "The order of nodes").
    """
    ordered: dict[ir.Node, None] = {}
    waiting = [value.producer() for value in reversed(graph.outputs)]
    while waiting:
        node = waiting.pop()
        if node is None or node in ordered or node.graph is not graph:
            continue
        makers = (value.producer() for value in read_by(node) if value is not None)
        if missing := [m for m in makers if m is not None and m not in ordered and m.graph is graph]:
            waiting += [node, *reversed(missing)]
        else:
            ordered[node] = None
    graph.remove([node for node in graph if node not in ordered])
    graph.extend(list(ordered))  # which moves them


def read_by(node: ir.Node) -> Iterator[ir.Value | None]:
    """Its inputs, and what its branches and bodies read and give."""
    yield from node.inputs
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            inside = attribute.as_graph()
            for inner in inside:
                yield from read_by(inner)
            yield from inside.outputs


def read_first(node: ir.Node, inputs: Sequence[ir.Value]) -> None:
    """A size of the inputs is read of the first that has it; the exporter takes any."""
    start, end = node.attributes.get_int("start"), node.attributes.get_int("end")
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or value.shape is None or not value.is_graph_input() or start is None or end != start + 1:
        return
    axes = ((each, axis) for each in inputs for axis, size in enumerate(each.shape or ()) if size == value.shape[start])
    first, axis = next(axes)
    node.replace_input_with(0, first)
    node.attributes["start"], node.attributes["end"] = ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)


def name_dimensions(graph: ir.Graph, shape: Interface) -> None:
    """Gives the symbolic dimensions the names of the interface, everywhere they occur."""
    inputs = {value.name: list(value.shape or ()) for value in graph.inputs}
    renamed = {str(inputs[name][axis]): new for new, (name, axis) in shape.DIMENSIONS.items()}
    pattern = re.compile("|".join(rf"\b{re.escape(old)}\b" for old in renamed))
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        if value.shape is not None:
            sizes = [getattr(size, "value", size) for size in value.shape]  # a number, a name, or None
            value.shape = ir.Shape(pattern.sub(lambda m: renamed[m[0]], d) if isinstance(d, str) else d for d in sizes)
    for value in graph.outputs:
        if value.name != "logits" and isinstance(shape, LlmShape):
            value.shape = ir.Shape(["batch", shape.kv_heads, "total", shape.head_dim])
