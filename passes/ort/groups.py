"""Group-wise weights against int8 tokens, exactly: ONNX Runtime has no operator for it, so a Scan adds up the groups.

y[m, n] = s_x[m] * sum_g s[g, n] * sum_{k in g} (x_q[m, k] - center) * (code[k, n] - zero[g, n])

The inner sums are integers (MatMulInteger); nothing is quantized again. A Scan holds one group's product at a time:
a batched MatMulInteger would hold all of them, which is gigabytes for a long prompt, and is no faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Array, Tile, View, small
from instantrt.passes.core.rewrite import Lowering, Reject, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.ort.limbs import Limbs, add_limbs, flipped, rows_as_limbs
from instantrt.passes.qdq.insert_qdq import Quantized, quantized


@dataclass(frozen=True)
class LowerGroups(Lowering[Quantized]):
    """MatMul(x, DequantizeLinear(codes in groups)) -> Scan over groups of MatMulInteger on one limb of x.

    Four-bit codes are widened to bytes, which changes no value. The limb of one x serves all its consumers.
    """

    requires = (weight_dq_feeds_matmul,)

    limbs: Limbs
    activations: Literal["int8"] = "int8"

    def match(self, node: gs.Node) -> Quantized | Reject | None:
        found = quantized(node)
        if found is None or found.quant.activations != self.activations:
            return None
        return Reject("one group: by channel") if found.quant.per_channel else found

    def rewrite(self, graph: gs.Graph, match: Quantized) -> None:
        q, path, flip = match.quant, match.path, 0x80 if self.limbs.signed_weights else 0
        (n, k), groups, size = q.shape, q.groups, q.group_size
        code_type = np.dtype(np.int8 if flip else np.uint8)

        def codes_by_group(tile: Tile) -> Array:
            return flipped(tile.parts[0], flip).view(code_type).T.reshape(groups, size, -1)

        def zeros_by_group(tile: Tile) -> Array:
            return flipped(tile.parts[2], flip).view(code_type).T

        def const(name: str, values: Any) -> gs.Constant:
            return small(f"{path}.{name}", values, np.int64)

        codes, scales, leading = rows_as_limbs(graph, match.x, k, self.limbs)
        weight = View(q, (groups, size, n), code_type, axis=2, project=codes_by_group)
        zero = View(q, (groups, n), code_type, axis=1, project=zeros_by_group)
        scale = View(q, (groups, n), np.float32, axis=1, project=lambda tile: tile.parts[1].T)
        rows = add(graph, "Reshape", [codes, const("by_group", [-1, groups, size])], f"{path}/by_group")
        rows = add(graph, "Transpose", [rows], f"{path}/groups_first", perm=[1, 0, 2])
        count = add(graph, "Shape", [codes], f"{path}/rows", end=1)
        shape = add(graph, "Concat", [count, const("width", [n])], f"{path}/sum_shape", axis=0)
        start = add(graph, "ConstantOfShape", [shape], f"{path}/start")
        constants = [
            gs.Constant(f"{path}.codes_u8", weight),
            gs.Constant(f"{path}.zeros_u8", zero),
            gs.Constant(f"{path}.scales_f32", scale),
        ]
        body = one_group(path, code_type, size, n, self.limbs.center)
        scan = {"body": body, "num_scan_inputs": 4}
        out = take_over(match.node)
        y = add(graph, "Scan", [start, rows, *constants], f"{path}/sums", name=match.node.name, **scan)
        y = add(graph, "Mul", [y, scales], f"{path}/by_token")
        add_limbs(graph, y, 1, (leading, n), path, out)

    def note(self, match: Quantized) -> str:  # noqa: ARG002
        return "MatMulInteger by group, one limb of 8 bits"


def one_group(path: str, code_type: np.dtype[Any], size: int, n: int, center: int) -> gs.Graph:
    """total [M, N] += MatMulInteger(rows [M, g], codes [g, N]) * scale [N]."""

    def variable(name: str, dtype: Any, shape: list[Any] | None) -> gs.Variable:
        return gs.Variable(f"{path}/group/{name}", dtype, shape)

    total, added = variable("total", np.float32, ["rows", n]), variable("added", np.float32, ["rows", n])
    rows = variable("rows", np.uint8, ["rows", size])
    codes, zero = variable("codes", code_type, [size, n]), variable("zero", code_type, [n])
    scale = variable("scale", np.float32, [n])
    graph = gs.Graph([], [total, rows, codes, zero, scale], [added], name=f"{path}/group")
    inputs = [rows, codes, small(f"{path}/group/center", center, np.uint8), zero]
    y = add(graph, "MatMulInteger", inputs, f"{path}/group/sum")
    y = add(graph, "Cast", [y], f"{path}/group/float", to=1)
    y = add(graph, "Mul", [y, scale], f"{path}/group/scaled")
    add(graph, "Add", [total, y], added)
    return graph
