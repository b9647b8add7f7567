"""What one node of a graph computes, on a CPU: products stream their weights, our operators run their references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from instantrt.passes.core.columns import column_blocks
from instantrt.passes.core.lazy import FLOAT32, Array, convert
from instantrt.passes.core.node_session import HALVES, NodeSession, value_of
from instantrt.passes.core.streaming import Runs, gather, gather_in_codes, matmul, streamed_table
from instantrt.plugins.ops import DOMAIN, OPS

OURS = {op.name: op for op in OPS}
STREAMED: dict[str, Callable[[gs.Node, Runs, gs.Graph], list[Array] | None]] = {
    "MatMul": matmul,
    "Gather": gather,
    "GatherBlockQuantized": gather_in_codes,
}


def dependencies(node: gs.Node) -> list[gs.Tensor]:
    """The variables a node reads; a weight that streams is no variable."""
    read = node.inputs
    if node.op == "MatMul" and column_blocks(node.inputs[1]) is not None:
        read = node.inputs[:1]
    elif node.op == "Gather" and streamed_table(node) is not None:
        read = node.inputs[1:]
    return [t for t in read if isinstance(t, gs.Variable) and t.name]


def evaluate_node(node: gs.Node, values: Mapping[str, Array], graph: gs.Graph) -> list[Array]:
    """The outputs of one node."""
    return next(evaluate_each(node, [values], graph))


def evaluate_each(node: gs.Node, runs: Runs, graph: gs.Graph) -> Iterator[list[Array]]:
    """The outputs of one node in each of several runs; a weight streams once for all of them.

    A run may read what an earlier one has just made, unless the node streams: each is asked for when its turn comes.
    """
    streamed = STREAMED[node.op](node, runs, graph) if node.op in STREAMED else None
    session: NodeSession | None = None
    types = [declared(node, tensor) for tensor in node.outputs]
    for index, values in enumerate(runs):
        if streamed is not None:
            outputs = [streamed[index]]
        elif node.op == "Cast":
            outputs = [cast(node, values)]
        elif node.domain == DOMAIN:
            op = OURS[node.op]
            inputs = [None if not t.name else value_of(t, values) for t in node.inputs]
            # A node also carries what TensorRT's parser looks for, such as the plugin's version.
            known = {a.name: node.attrs[a.name] for a in op.attrs if a.name in node.attrs}
            outputs = list(op.reference(*inputs, **known))
        else:
            session = session or NodeSession(node, values, graph)
            outputs = session(values)
        yield [narrow(value, dtype, node, values) for value, dtype in zip(outputs, types, strict=True)]


def declared(node: gs.Node, tensor: gs.Tensor) -> np.dtype[Any] | None:
    """The type of an output, where the node's scale or the graph says it."""
    scale = node.inputs[1].dtype if node.op == "DequantizeLinear" else None
    return next((numpy_type(known) for known in (scale, tensor.dtype) if known is not None), None)


def narrow(value: Array, dtype: np.dtype[Any] | None, node: gs.Node, values: Mapping[str, Array]) -> Array:
    """Rounds to the 16-bit type that an output has: the declared one, or that of the node's inputs."""
    if value.dtype != FLOAT32 or node.op == "Cast":
        return value
    if dtype is None:
        dtype = next((values[t.name].dtype for t in node.inputs if t.name in values), FLOAT32)
    return value.astype(dtype) if dtype in HALVES else value


def cast(node: gs.Node, values: Mapping[str, Array]) -> Array:
    with np.errstate(over="ignore"):  # an infinity is reported by name
        return convert(value_of(node.inputs[0], values), numpy_type(node.attrs["to"]))


def numpy_type(dtype: Any) -> np.dtype[Any]:
    """A type as NumPy has it; graphs name those it lacks by ONNX's number."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)
