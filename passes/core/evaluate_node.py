"""What one node of a graph computes, on a CPU: products stream their weights, our operators run their references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.passes.core.lazy import Array, View, convert, view_of
from instantrt.passes.core.rewrite import producer, scalar
from instantrt.plugins.ops import DOMAIN, OPS

FLOAT32 = np.dtype(np.float32)
HALVES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
OURS = {op.name: op for op in OPS}
EXTERNAL_BYTES = 1 << 20  # larger constants reach a session as they lie in memory, without a copy in a protobuf


def dependencies(node: gs.Node) -> list[gs.Tensor]:
    """The variables a node reads; a weight that streams is no variable."""
    read = node.inputs
    if node.op == "MatMul" and column_blocks(node.inputs[1]) is not None:
        read = node.inputs[:1]
    elif node.op == "Gather" and stored_table(node) is not None:
        read = node.inputs[1:]
    return [t for t in read if isinstance(t, gs.Variable) and t.name]


def evaluate_node(node: gs.Node, values: Mapping[str, Array], graph: gs.Graph) -> list[Array]:
    """The outputs of one node."""
    special = SPECIAL.get(node.op)
    done = special(node, values) if special else None
    if done is not None:
        outputs = [done]
    elif node.domain == DOMAIN:
        op = OURS[node.op]
        inputs = [None if not t.name else value_of(t, values) for t in node.inputs]
        # A node also carries what TensorRT's parser looks for, such as the plugin's version.
        outputs = list(op.reference(*inputs, **{a.name: node.attrs[a.name] for a in op.attrs if a.name in node.attrs}))
    else:
        outputs = run_session(node, values, graph)
    return [narrow(value, tensor, node, values) for value, tensor in zip(outputs, node.outputs, strict=True)]


def value_of(tensor: gs.Tensor, values: Mapping[str, Array]) -> Array:
    view = view_of(tensor)
    if view is not None:
        return view.load()
    return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else values[tensor.name]


def narrow(value: Array, tensor: gs.Tensor, node: gs.Node, values: Mapping[str, Array]) -> Array:
    """Rounds to the 16-bit type that the tensor has: the declared one, or that of the node's inputs."""
    if value.dtype != FLOAT32:
        return value
    first = next((values[t.name].dtype for t in node.inputs if t.name in values), FLOAT32)
    dtype = numpy_type(tensor.dtype) if tensor.dtype is not None else first
    return value.astype(dtype) if dtype in HALVES and node.op not in ("Cast", "DequantizeLinear") else value


def matmul(node: gs.Node, values: Mapping[str, Array]) -> Array | None:
    """x [..., K] @ W [K, N], W by blocks of columns; float32 sums."""
    blocks = column_blocks(node.inputs[1])
    if blocks is None:
        return None
    x = convert(values[node.inputs[0].name], FLOAT32)
    rows = x.reshape(-1, x.shape[-1])
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is reported by name
        parts = [rows @ convert(block, FLOAT32) for block in blocks()]
    return np.concatenate(parts, axis=1).reshape(*x.shape[:-1], -1)


def column_blocks(weight: gs.Tensor) -> Blocks | None:
    """Blocks of columns [K, n] of a constant matrix, or of what Cast, Transpose or DequantizeLinear make of one."""
    view = view_of(weight)
    if view is not None:
        return (lambda: (view.block(t) for t in view.source.tiles())) if view.axis == 1 else None
    node = weight.inputs[0] if weight.inputs else None
    make = COLUMNS.get(node.op) if node is not None else None
    return make(node) if make is not None else None


def transposed_blocks(node: gs.Node) -> Blocks | None:
    view = view_of(node.inputs[0])
    if view is None or view.axis != 0 or len(view.shape) != 2:
        return None
    return lambda: (view.block(t).T for t in view.source.tiles())


def dequantized(node: gs.Node) -> Blocks | None:
    """Codes, scale and zero come tile by tile from one source."""
    codes, *others = (view_of(t) for t in node.inputs)
    if codes is None or any(v is None or v.source != codes.source for v in others):
        return None
    return lambda: dequantized_blocks(codes, [v for v in others if v is not None], node.attrs)


Blocks = Callable[[], Iterator[Array]]
COLUMNS: dict[str, Callable[[gs.Node], Blocks | None]] = {
    "Cast": lambda node: column_blocks(node.inputs[0]),
    "Transpose": transposed_blocks,
    "DequantizeLinear": dequantized,
}


def dequantized_blocks(codes: View, others: list[View], attrs: Mapping[str, Any]) -> Iterator[Array]:
    """DequantizeLinear(codes [K, N], scale, zero) by columns; scale and zero are [N], or [K / block_size, N]."""
    repeat = attrs.get("block_size", 0)
    for tile in codes.source.tiles():
        q = codes.block(tile).astype(FLOAT32)
        scale, *zero = (
            np.repeat(part, repeat, axis=0) if repeat else part
            for part in (v.block(tile).astype(FLOAT32) for v in others)
        )
        yield (q - zero[0] if zero else q) * scale


def stored_table(node: gs.Node) -> tuple[View, float | None] | None:
    """The table [V, ...] whose rows a Gather picks, and the one scale it is dequantized by, None where it is not."""
    codes, scale = node.inputs[0], None
    dq = producer(codes, "DequantizeLinear")
    if dq is not None and len(dq.inputs) == 2:
        codes, scale = dq.inputs[0], scalar(dq.inputs[1])
    view = view_of(codes)
    if view is None or view.axis != 0 or node.attrs.get("axis", 0) != 0 or (dq is not None and scale is None):
        return None
    return view, scale


def gather(node: gs.Node, values: Mapping[str, Array]) -> Array | None:
    """Rows of a stored table, picked as its tiles go by."""
    found = stored_table(node)
    if found is None:
        return None
    view, scale = found
    ids = value_of(node.inputs[1], values)
    out = np.empty((*ids.shape, *view.shape[1:]), view.dtype)
    for tile in view.source.tiles():
        here = (ids >= tile.start) & (ids < tile.start + len(tile.parts[0]))
        if here.any():
            out[here] = view.block(tile)[ids[here] - tile.start]
    return out if scale is None else out.astype(FLOAT32) * np.float32(scale)


def cast(node: gs.Node, values: Mapping[str, Array]) -> Array:
    with np.errstate(over="ignore"):  # an infinity is reported by name
        return convert(value_of(node.inputs[0], values), numpy_type(node.attrs["to"]))


def numpy_type(dtype: Any) -> np.dtype[Any]:
    """A type as NumPy has it; graphs name those it lacks by ONNX's number."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)


SPECIAL: dict[str, Callable[[gs.Node, Mapping[str, Array]], Array | None]] = {
    "MatMul": matmul,
    "Gather": gather,
    "Cast": cast,
}


def run_session(node: gs.Node, values: Mapping[str, Array], graph: gs.Graph) -> list[Array]:
    """One node through ONNX Runtime. Constants stay constants: kernels that pack their weights then do so."""
    inputs: list[gs.Tensor] = []
    feeds: dict[str, Array] = {}
    large: dict[str, Array] = {}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for tensor in node.inputs:
        if not tensor.name:
            inputs.append(gs.Variable.empty())
            continue
        value = value_of(tensor, values)
        value = value.astype(FLOAT32) if value.dtype in HALVES else value
        if isinstance(tensor, gs.Constant) and value.nbytes < EXTERNAL_BYTES:
            inputs.append(gs.Constant(tensor.name, np.asarray(value, order="C")))
            continue
        inputs.append(gs.Variable(tensor.name, value.dtype, value.shape))
        (large if isinstance(tensor, gs.Constant) else feeds)[tensor.name] = np.asarray(value, order="C")
    outputs = [gs.Variable(t.name) for t in node.outputs]
    single = gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs, domain=node.domain)
    fed = list({t.name: t for t in inputs if isinstance(t, gs.Variable) and t.name}.values())
    model = gs.export_onnx(
        gs.Graph([single], fed, outputs, opset=graph.opset, import_domains=graph.import_domains), do_type_check=False
    )
    externalize(model, large)
    options.add_external_initializers(list(large), [ort.OrtValue.ortvalue_from_numpy(v) for v in large.values()])
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, feeds)
    return results


def externalize(model: onnx.ModelProto, large: Mapping[str, Array]) -> None:
    """Turns the inputs that `large` names into initializers whose values are handed over apart."""
    kept = [i for i in model.graph.input if i.name not in large]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, value in large.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=value.shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="memory")
        model.graph.initializer.append(tensor)
