"""RotaryEmbedding in the operators that TensorRT had before 10.15 (docs/facts.md, "First releases of operators")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import small
from instantrt.passes.core.rewrite import Reject, Rewrite, add, once, take_over


@dataclass(frozen=True)
class RotaryMatch:
    """`rotated` of the `width` elements of a head turn; the rest pass."""

    node: gs.Node
    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor
    rotated: int
    width: int
    interleaved: bool


class DecomposeRotary(Rewrite[RotaryMatch]):
    """RotaryEmbedding(x, cos, sin) -> Concat(a * cos - b * sin, b * cos + a * sin [, the rest of x]).

    x [B, H, S, D]; cos and sin [B, S, R/2]; a and b are the halves of x's first R elements, or, interleaved, those of
    even and odd place.
    """

    def match(self, node: gs.Node) -> RotaryMatch | Reject | None:
        if node.op != "RotaryEmbedding":
            return None
        x, cos, sin = node.inputs[:3]
        if any(t.name for t in node.inputs[3:]):
            return Reject("a rotary embedding that looks its angles up by position")
        if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[3], int):
            return Reject("a rotary embedding of other than [batch, heads, sequence, head_dim]")
        width = int(x.shape[3])
        rotated = node.attrs.get("rotary_embedding_dim", 0) or width
        return RotaryMatch(node, x, cos, sin, rotated, width, bool(node.attrs.get("interleaved", 0)))

    def rewrite(self, graph: gs.Graph, match: RotaryMatch) -> None:
        out, name = take_over(match.node), match.node.name
        head, rest = self.parted(graph, match, name)
        if match.interleaved:
            # [B, H, S, R/2, 2]: what belongs together is side by side, on an axis of its own.
            head = reshape(graph, head, [0, 0, 0, -1, 2], f"{name}/pairs")
        half = 1 if match.interleaved else match.rotated // 2
        a, b = split(graph, head, [half, half], f"{name}/half")
        cos, sin = (self.by_head(graph, t, match) for t in (match.cos, match.sin))
        terms = [
            add(graph, "Mul", [left, right], f"{name}/{label}")
            for left, right, label in ((a, cos, "a_cos"), (b, sin, "b_sin"), (b, cos, "b_cos"), (a, sin, "a_sin"))
        ]
        turned = [add(graph, "Sub", terms[:2], f"{name}/turned_a"), add(graph, "Add", terms[2:], f"{name}/turned_b")]
        if match.interleaved:
            pairs = add(graph, "Concat", turned, f"{name}/turned_pairs", axis=-1)
            turned = [reshape(graph, pairs, [0, 0, 0, match.rotated], f"{name}/turned")]
        add(graph, "Concat", [*turned, *rest], out, name=name, axis=-1)

    def parted(self, graph: gs.Graph, match: RotaryMatch, name: str) -> tuple[gs.Tensor, list[gs.Tensor]]:
        """What turns, and what passes: nothing, or one tensor."""
        if match.rotated == match.width:
            return match.x, []
        head, rest = split(graph, match.x, [match.rotated, match.width - match.rotated], f"{name}/part")
        return head, [rest]

    def by_head(self, graph: gs.Graph, angles: gs.Tensor, match: RotaryMatch) -> gs.Tensor:
        """[B, S, R/2] -> [B, 1, S, R/2], or [B, 1, S, R/2, 1] for pairs; computed once for all that share it."""
        axes = [1, 4] if match.interleaved else [1]
        name = f"{angles.name}/{'pairs' if match.interleaved else 'heads'}"
        return once(graph, "Unsqueeze", [angles, small(f"{name}/axes", axes, np.int64)], name)


def reshape(graph: gs.Graph, x: gs.Tensor, shape: list[int], name: str) -> gs.Tensor:
    return add(graph, "Reshape", [x, small(f"{name}/shape", shape, np.int64)], name)


def split(graph: gs.Graph, x: gs.Tensor, sizes: list[int], name: str) -> list[gs.Tensor]:
    """`x` in parts along the last axis."""
    parts = [gs.Variable(f"{name}{i}") for i in range(len(sizes))]
    lengths = small(f"{name}/sizes", sizes, np.int64)
    graph.nodes.append(gs.Node("Split", name, {"axis": -1}, [x, lengths], parts))
    return parts
