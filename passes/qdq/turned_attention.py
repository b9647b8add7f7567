"""What attention gives where all of its keys, or values, are turned by one matrix or moved by one vector."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32
from instantrt.passes.core.rewrite import Prefixed, add


def sees_differences(attention: gs.Node, keys: gs.Tensor) -> bool:
    """Does it read `keys` as keys, and are their differences all that its output is made of?"""
    return attention.inputs[1] is keys and not attention.attrs.get("softcap") and len(attention.outputs) == 1


def turned(graph: gs.Graph, attention: gs.Node, *, is_key: bool, by: gs.Constant) -> None:
    """Attention whose keys, or values, are multiplied by the orthogonal `by`: it gives what it gave."""
    nodes = Prefixed(graph, f"{attention.name}/rotated")
    if is_key:
        query = attention.inputs[0]
        attention.inputs[0] = nodes("MatMul", [query, by], "queries")
        attention.inputs[0].dtype, attention.inputs[0].shape = query.dtype, query.shape
        return
    back = nodes.const("back", by.values.T, FLOAT32)
    out = attention.outputs[0]
    inside = gs.Variable(f"{nodes.prefix}/outputs", out.dtype, out.shape)
    attention.outputs[0] = inside
    add(graph, "MatMul", [inside, back], out)
