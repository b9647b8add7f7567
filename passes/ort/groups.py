"""Group-wise weights against int8 tokens, exactly: ONNX Runtime has no operator for it, so a Scan adds up the groups.

y[m, n] = s_x[m] * sum_g s[g, n] * sum_{k in g} (x_q[m, k] - center) * (code[k, n] - zero[g, n])

The inner sums are integers (MatMulIntegerToFloat); nothing is quantized again. A Scan holds one group's product at a
time: a batched product would hold all of them, which is gigabytes for a long prompt, and is no faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View, small
from instantrt.passes.core.rewrite import Lowering, Reject, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.limbs import Limbs, limbs_of
from instantrt.passes.ort.zeros import missing_form
from instantrt.passes.qdq.insert_qdq import Quantized, quantized


@dataclass(frozen=True)
class LowerGroups(Lowering[Quantized]):
    """MatMul(x, DequantizeLinear(codes in groups)) -> Scan over groups of MatMulIntegerToFloat on one limb of x.

    Four-bit codes are widened to bytes, which changes no value. The limb of one x serves all its consumers.
    """

    requires = (weight_dq_feeds_matmul,)

    limbs: Limbs

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != "int8":
            return None
        wrong = "one group: by channel" if found.quant.per_channel else missing_form(found)
        return Reject(wrong) if wrong else found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        q, path, limbs, kind = match.quant, match.path, self.limbs, self.limbs.weight_type
        n, groups, size = q.shape[0], q.groups, q.group_size

        def codes_by_group(tile: Tile) -> Array:
            return limbs.weight(tile.parts[0]).T.reshape(groups, size, -1)

        def const(name: str, values: Any) -> gs.Constant:
            return small(f"{path}.{name}", values, np.int64)

        x = limbs_of(graph, match, limbs)
        weight = View(q, (groups, size, n), kind, axis=2, project=codes_by_group)
        zero = View(q, (groups, n), kind, axis=1, project=lambda tile: limbs.weight(tile.parts[2]).T)
        scale = View(q, (groups, n), np.float32, axis=1, project=lambda tile: tile.parts[1].T)
        rows = add(graph, "Reshape", [x.codes[0], const("by_group", [-1, groups, size])], f"{path}/by_group")
        rows = add(graph, "Transpose", [rows], f"{path}/groups_first", perm=[1, 0, 2])
        count = add(graph, "Shape", [rows], f"{path}/rows", start=1, end=2)
        shape = add(graph, "Concat", [count, const("width", [n])], f"{path}/sum_shape", axis=0)
        start = add(graph, "ConstantOfShape", [shape], f"{path}/start")
        constants = [
            gs.Constant(f"{path}.codes_{kind}", weight),
            gs.Constant(f"{path}.zeros_{kind}", zero),
            gs.Constant(f"{path}.scales_f32", scale),
        ]
        body = one_group(path, kind, size, n, limbs.center)
        scan = {"body": body, "num_scan_inputs": 4}
        out = take_over(match.node)
        y = add(graph, "Scan", [start, rows, *constants], f"{path}/sums", name=match.node.name, **scan)
        leading = add(graph, "Shape", [match.x], f"{path}/leading", start=0, end=-1)
        shape = add(graph, "Concat", [leading, const("n", [n])], f"{path}/shape", axis=0)
        y = add(graph, "Reshape", [y, shape], f"{path}/by_row")
        add(graph, "Mul", [y, x.step], out)

    def note(self, match: Quantized) -> str:  # noqa: ARG002
        return "MatMulIntegerToFloat by group, one limb of 8 bits"


def one_group(path: str, kind: np.dtype[Any], size: int, n: int, center: int) -> gs.Graph:
    """total [M, N] += MatMulIntegerToFloat(rows [M, g], codes [g, N], scale [N])."""

    def variable(name: str, dtype: Any, shape: list[Any] | None) -> gs.Variable:
        return gs.Variable(f"{path}/group/{name}", dtype, shape)

    total, added = variable("total", np.float32, ["rows", n]), variable("added", np.float32, ["rows", n])
    rows = variable("rows", np.uint8, ["rows", size])
    codes, zero = variable("codes", kind, [size, n]), variable("zero", kind, [n])
    scale = variable("scale", np.float32, [n])
    graph = gs.Graph([], [total, rows, codes, zero, scale], [added], name=f"{path}/group")
    one, middle = small(f"{path}/group/one", 1, np.float32), small(f"{path}/group/center", center, np.uint8)
    inputs = [rows, codes, one, scale, middle, zero]
    y = add(graph, "MatMulIntegerToFloat", inputs, f"{path}/group/product", domain="com.microsoft")
    add(graph, "Add", [total, y], added)
    return graph
