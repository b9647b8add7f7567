"""Embedding tables of 8 bits for TensorRT without a plugin: the rows of the ids that are asked for, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, View, small
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject, Rewrite, add, take_over
from instantrt.passes.core.verify import tables_are_float32
from instantrt.passes.qdq.tables import Table, table


@dataclass(frozen=True)
class LowerNativeTables(Rewrite[Table]):
    """Gather(table [V, H], ids) -> (Gather(codes) - Gather(zeros)) * Gather(scales), a row as [G, H / G].

    TensorRT has int8 constants in front of a DequantizeLinear only; its scale of one rounds nothing, and neither does
    the difference of two codes. TensorRT-RTX makes all of it one kernel, which reads the rows of `ids` alone.
    `scale_dtype` is the compute type. See docs/facts.md, "Which operators TensorRT lacks".
    """

    requires = (tables_are_float32,)

    scale_dtype: np.dtype[Any]

    def match(self, node: gs.Node) -> Table | Reject | None:
        found = table(node, self.scale_dtype)
        if isinstance(found, Table) and node.inputs[1].shape is None:
            return Reject("the rank of the ids is not known")
        return found

    def rewrite(self, graph: gs.Graph, match: Table) -> None:
        q, ids, out = match.quant, match.node.inputs[1], take_over(match.node)
        v, h = q.shape
        one = small(f"{out.name}/one", 1, np.float32)

        def rows(name: str, part: int, width: int) -> gs.Tensor:
            view = View(q, (v, q.groups, width), np.int8, project=lambda t: signed(t.parts[part], q))
            whole = add(graph, "DequantizeLinear", [gs.Constant(f"{name}/int8", view), one], f"{name}/whole")
            return add(graph, "Gather", [whole, ids], name, axis=0)

        codes, zeros = rows(f"{out.name}/codes", 0, q.group_size), rows(f"{out.name}/zeros", 2, 1)
        view = View(q, (v, q.groups, 1), np.float32, project=lambda t: t.parts[1][..., None])
        scales = add(
            graph, "Gather", [gs.Constant(f"{out.name}/scales/float", view), ids], f"{out.name}/scales", axis=0
        )
        steps = add(graph, "Sub", [codes, zeros], f"{out.name}/steps")
        values = add(graph, "Mul", [steps, scales], f"{out.name}/groups")
        shape = small(f"{out.name}/shape", [0] * len(ids.shape) + [h], np.int64)
        add(graph, "Reshape", [values, shape], out, name=match.node.name)

    def note(self, match: Table) -> str:
        return f"int8 rows in blocks of {match.quant.group_size}"


def signed(part: Array, q: QuantTensor) -> Array:
    """Codes [n, H] or zero points [n, G] less the central code: int8 [n, G, 128 say] or [n, G, 1]."""
    return np.subtract(part, np.uint8(q.central)).view(np.int8).reshape(len(part), q.groups, -1)
