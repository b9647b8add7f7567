"""An .onnx file -> FLOAT graph whose large constants are references into the file's external data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx.numpy_helper import from_array, to_array

from instantrt.compiler.artifact.positions import every_position
from instantrt.compiler.frontend.made_once import check_made_once, own_names
from instantrt.compiler.frontend.model import OPSET, FloatModel, LlmShape, stored_types
from instantrt.compiler.frontend.opset import STANDARD, at_opset, has_rule, names_within, standard_opset, with_types
from instantrt.passes.core.errors import UserError, first_line
from instantrt.passes.core.lazy import FOUR_BIT, Array, FileTensor, InMemory, View, read_exactly
from instantrt.passes.core.names import LOGITS, PAST
from instantrt.passes.core.subgraphs import graphs, tensors, within
from instantrt.passes.core.verify import QDQ_OPS

SMALL = 1 << 10  # elements: the values of axes, shapes and scalars are looked at, weights are references
NARROW = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
FIRST_IR = 10  # of the artifacts
CONTRIB = "com.microsoft"
TYPES = ("to", "dtype", "output_datatype", "stash_type", "softmax_precision")  # attributes that name one
LITERALS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def load_onnx(path: Path) -> FloatModel:
    """Reads `path`; external data must lie in its folder. An LLM with the interface's names is recognised by them.

    Whatever float16 or bfloat16 the file has is float32 in the graph, inputs and outputs included; its weights are
    widened as they are read.
    """
    model = inlined(every_position(read(path)), path)  # an artifact's are the last token's, unless all are asked for
    refuse_quantized(model, path)
    tidy(model, path)
    check_nodes(model, path)
    own_names(model.graph)
    check_made_once(model.graph, path)
    constant_nodes(model)
    weights = take_weights(model, path)
    notes = (*widen(model, weights, path), *at_opset(model, path))
    constant_nodes(model)
    model = inferred(model, path)
    name_nodes(model)
    graph = imported(model, weights)
    files = (path, *dict.fromkeys(v.source.path for v in weights.values() if isinstance(v.source, FileTensor)))
    return FloatModel(graph, path.parent, {}, {}, llm_shape(graph), files, stored_types(graph), notes)


def artifact_graph(path: Path) -> gs.Graph:
    """The graph of a file that the compiler wrote, as it is but for its logits: they are those of every position."""
    model = every_position(read(path))
    weights = take_weights(model, path)
    return imported(model, weights)


def read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise UserError("not a readable ONNX file", where=str(path), found=str(error)) from None
    if not model.graph.node:
        raise UserError("not an ONNX model, or an empty one", where=str(path))
    return model


def imported(model: onnx.ModelProto, weights: Mapping[str, View]) -> gs.Graph:
    for each in graphs(model.graph):  # graphsurgeon describes tensors only
        described = [v for v in each.value_info if v.type.WhichOneof("value") == "tensor_type"]
        del each.value_info[:]
        each.value_info.extend(described)
    graph = gs.import_onnx(model)
    for name, tensor in tensors(graph).items():
        if name in weights:
            tensor.values = weights[name]
        elif isinstance(tensor, gs.Constant) and tensor.dtype == onnx.TensorProto.BFLOAT16:  # its values have a type
            tensor.values = tensor.values
    return graph


def check_nodes(model: onnx.ModelProto, path: Path) -> None:
    """Inputs, outputs and attributes of each node as its operator has them: passes count on it.

    What holds subgraphs is left out: they may read what only their place in the graph shows. So are constants with
    external data, which the checker looks for in another folder.
    """
    context = onnx.checker.C.CheckerContext()
    context.ir_version, version = model.ir_version, standard_opset(model, path)
    context.opset_imports = {o.domain: o.version for o in model.opset_import}
    for node in (n for graph in graphs(model.graph) for n in graph.node):
        if within(node) or any(a.graphs or a.t.external_data for a in node.attribute):
            continue
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            if has_rule(node, version) and (
                not onnx.defs.has(node.op_type) or onnx.defs.get_schema(node.op_type, version, "").deprecated
            ):
                continue  # but ONNX Runtime takes it, and it is put into other words
            raise UserError(
                "a node that its operator does not allow",
                where=f"{path}, {node.op_type} {node.name or node.output[:1]}",
                found=first_line(error),
                fix="export the model again",
            ) from None


def refuse_quantized(model: onnx.ModelProto, path: Path) -> None:
    found = next((n for graph in graphs(model.graph) for n in graph.node if n.op_type in QDQ_OPS), None)
    if found is not None:
        raise UserError(
            "the model is quantized already",
            where=str(path),
            expected="a float model",
            found=f"{found.op_type} {found.name}".strip(),
            fix="compile the float model it was made from",
        )


def tidy(model: onnx.ModelProto, path: Path) -> None:
    """What the same model may be written as: weights that are inputs, too, the standard domain by its long name.

    ONNX Runtime takes its own operators without their opset.
    """
    standard_opset(model, path)
    sparse = next((t.values.name for graph in graphs(model.graph) for t in graph.sparse_initializer), None)
    if sparse is not None:
        raise UserError("sparse weights are not supported", where=f"{path}, initializer {sparse}")
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.WhichOneof("value") or "tensor_type"
        if kind != "tensor_type":
            found = kind.removesuffix("_type")
            raise UserError("an input or output that is no tensor", where=f"{path}, {value.name}", found=found)
    model.ir_version = max(model.ir_version, FIRST_IR)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    for each in (*nodes, *model.opset_import):
        each.domain = "" if each.domain in STANDARD else each.domain
    if any(node.domain == CONTRIB for node in nodes) and all(o.domain != CONTRIB for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))


def constant_nodes(model: onnx.ModelProto) -> None:
    """Constant nodes become initializers, which is what passes look for."""
    for graph in graphs(model.graph):
        outputs = {output.name for output in graph.output}
        for index, node in reversed(list(enumerate(graph.node))):
            value = literal(node) if node.op_type == "Constant" and node.output[0] not in outputs else None
            if value is not None:
                graph.initializer.add().CopyFrom(value)
                graph.initializer[-1].name = node.output[0]
                del graph.node[index]


def literal(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant node holds; None for strings and sparse ones."""
    (attribute,) = node.attribute
    if attribute.name in LITERALS:
        return from_array(np.array(onnx.helper.get_attribute_value(attribute), LITERALS[attribute.name]))
    return attribute.t if attribute.name == "value" else None


def widen(model: onnx.ModelProto, weights: dict[str, View], path: Path) -> tuple[str, ...]:
    """Makes float32 of all that has a narrow float type, `weights` included, and says what that changes.

    A value that is only rounded, to be cast to another type at once, stays narrow: the rounding is all it is for.
    """
    interface = {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    found, unrounded = set(), 0
    for graph in graphs(model.graph):
        rounded = only_rounded(graph)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.name not in rounded:
                found |= widen_type(value.type)
        for tensor in graph.initializer:
            if tensor.data_type not in NARROW:
                continue
            found.add(tensor.data_type)
            if tensor.name in weights:
                view, tensor.data_type = weights[tensor.name], TensorProto.FLOAT
                weights[tensor.name] = View(view.source, view.shape, np.float32)
            else:
                tensor.CopyFrom(from_array(to_array(tensor).astype(np.float32), tensor.name))
        for node in (n for n in graph.node if not rounded & set(n.output)):
            unrounded += node.op_type == "CastLike"
            for attribute in node.attribute:
                if attribute.name in TYPES and attribute.i in NARROW:
                    found.add(attribute.i)
                    unrounded += node.op_type == "Cast"
                    attribute.i = TensorProto.FLOAT
                found |= widen_type(attribute.tp)
                if attribute.t.data_type in NARROW:
                    found.add(attribute.t.data_type)
                    attribute.t.CopyFrom(from_array(to_array(attribute.t).astype(np.float32)))
    if found:
        refuse_bits(model, path)
    names = " and ".join(name for kind, name in NARROW.items() if kind in found)
    return (
        *(f"{name} inputs and outputs become float32" for kind, name in NARROW.items() if kind in interface),
        *((f"{names} becomes float32: casts to it no longer round or overflow",) if names and unrounded else ()),
    )


def only_rounded(graph: onnx.GraphProto) -> set[str]:
    """What a Cast made narrow, and nothing but Casts read."""
    narrow = {n.output[0] for n in graph.node if n.op_type == "Cast" and any(a.i in NARROW for a in n.attribute)}
    others = {name for n in graph.node if n.op_type != "Cast" for name in (*n.input, *names_within(n))}
    return narrow - others - {output.name for output in graph.output}


def widen_type(kind: onnx.TypeProto) -> set[int]:
    """The narrow types that `kind` had, or had the elements of."""
    inner = getattr(kind, kind.WhichOneof("value") or "tensor_type")
    if isinstance(inner.elem_type, onnx.TypeProto):
        return widen_type(inner.elem_type)
    if inner.elem_type not in NARROW:
        return set()
    found, inner.elem_type = {inner.elem_type}, TensorProto.FLOAT
    return found


def refuse_bits(model: onnx.ModelProto, path: Path) -> None:
    for node in (n for graph in graphs(model.graph) for n in graph.node if n.op_type == "BitCast"):
        raise UserError(
            "the bits of a float16 or bfloat16 model are looked at, and its values become float32",
            where=f"{path}, node {node.name or node.output[0]}",
            found="BitCast",
            fix="export the model in float32",
        )


def inferred(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model with every type and shape that follows from its inputs and weights; passes go by them."""
    model = with_types(model, path)
    if names := unranked(model):
        raise UserError(
            "the rank of an input or output is not known",
            where=str(path),
            expected="tensors with a type and a shape, whose sizes may have names",
            found=", ".join(names),
            fix="export the model with the shapes of its inputs and outputs",
        )
    return model


def name_nodes(model: onnx.ModelProto) -> None:
    """Nodes that have no name get one each: what passes add beside a node is named after it."""
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    taken, numbers = {node.name for node in nodes}, count()
    for node in (node for node in nodes if not node.name):
        node.name = next(name for i in numbers if (name := f"{node.op_type}_{i}") not in taken)


def unranked(model: onnx.ModelProto) -> list[str]:
    kinds = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.output)}
    return [name for name, kind in kinds.items() if not kind.elem_type or not kind.HasField("shape")]


def inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model without local functions. Their operators must be of the model's opset: none of theirs is converted."""
    if not model.functions:
        return model
    version = standard_opset(model, path)
    for function in model.functions:
        for opset in (o for o in function.opset_import if o.domain in STANDARD and o.version != version):
            raise UserError(
                "a local function is of another opset than the model",
                where=f"{path}, function {function.name}",
                expected=f"opset {version}",
                found=f"opset {opset.version}",
                fix="export the model without local functions",
            )
    spell_defaults(model)
    try:
        return onnx.inliner.inline_local_functions(model)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise UserError(
            f"the model cannot be brought to opset {OPSET}",
            where=str(path),
            found=first_line(error),
            fix="export the model without local functions",
        ) from None


def spell_defaults(model: onnx.ModelProto) -> None:
    """What a call leaves to its function's defaults: onnx's inliner forgets those."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    inner = (graph for function in model.functions for node in function.node for graph in within(node))
    bodies = (*model.functions, *(each for graph in (model.graph, *inner) for each in graphs(graph)))
    for node in (node for body in bodies for node in body.node):
        called = functions.get((node.domain, node.op_type, node.overload))
        said = {attribute.name for attribute in node.attribute}
        node.attribute.extend(a for a in (called.attribute_proto if called else ()) if a.name not in said)


def take_weights(model: onnx.ModelProto, path: Path) -> dict[str, View]:
    """References to what is large or external, by name; what the model had of it is dropped."""
    weights: dict[str, View] = {}
    for tensor in (t for graph in graphs(model.graph) for t in graph.initializer):
        if min(tensor.dims, default=0) < 0:
            raise UserError("a weight of negative size", where=f"{path}, {tensor.name}", found=str(list(tensor.dims)))
        if tensor.external_data and not math.prod(tensor.dims):  # no byte to refer to
            tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
        if not tensor.external_data and math.prod(tensor.dims) <= SMALL:
            continue
        if tensor.name in weights:
            raise UserError("weights of different branches have one name", where=str(path), found=tensor.name)
        source = external_tensor(path, tensor) if tensor.external_data else InMemory(to_array(tensor))
        if source.dtype in FOUR_BIT and isinstance(source, FileTensor):
            source = InMemory(unpacked(source, tensor.data_type))
        weights[tensor.name] = View(source, tuple(tensor.dims), source.dtype)
        tensor.CopyFrom(TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type))
    return weights


def external_tensor(model: Path, tensor: onnx.TensorProto) -> FileTensor:
    """A checked reference to external data: inside the model's folder, inside the file, of the right size."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    folder = model.parent.resolve()
    path = (folder / info.get("location", "")).resolve()
    where = f"{model}, initializer {tensor.name}"
    if not path.is_relative_to(folder):
        raise UserError(
            "external data outside the model's folder",
            where=where,
            found=repr(info.get("location")),
            fix="do not use this model unless you trust where it came from",
        )
    if not path.is_file():
        raise UserError("external data is missing", where=where, expected=str(path))
    dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(tensor.dims)
    size = -(-math.prod(shape) // 2) if dtype in FOUR_BIT else math.prod(shape) * dtype.itemsize
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", size))
    except ValueError:
        raise UserError("external data with an offset that is no number", where=where, found=str(info)) from None
    available = path.stat().st_size
    if min(shape, default=1) < 0 or length != size or offset < 0 or offset + size > available:
        raise UserError(
            "external data does not fit its tensor",
            where=where,
            expected=f"{size} bytes for {list(shape)} {dtype}",
            found=f"{length} bytes at {offset} of {available}",
        )
    return FileTensor(path, offset, shape, dtype, tensor.name)


def unpacked(tensor: FileTensor, kind: int) -> Array:
    """Four-bit values, two of which share a byte of the file, each by itself; `kind` is onnx's word for their type."""
    with tensor.path.open("rb", buffering=0) as file:
        packed = read_exactly(file.fileno(), tensor.offset, -(-math.prod(tensor.shape) // 2), tensor)
    values: Array = to_array(TensorProto(dims=tensor.shape, data_type=kind, raw_data=packed.tobytes()))
    return values


def llm_shape(graph: gs.Graph) -> LlmShape | None:
    """The sizes of a causal LM whose inputs and outputs have the interface's names; None for any other graph."""
    inputs, outputs = ({t.name: t for t in side} for side in (graph.inputs, graph.outputs))
    layers = sum(name.startswith(PAST) and name.endswith(".key") for name in inputs)
    if not layers or LOGITS not in outputs:
        return None
    _, kv_heads, _, head_dim = inputs[f"{PAST}0.key"].shape
    vocab = outputs[LOGITS].shape[-1]
    if not all(isinstance(d, int) for d in (kv_heads, head_dim, vocab)):
        return None
    return LlmShape(layers=layers, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab)
