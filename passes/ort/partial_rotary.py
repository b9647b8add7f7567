"""Rotary embeddings of a part of each head, as the operator has them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, add, producer, take_over
from instantrt.passes.float.fuse_rotary import last_slice


@dataclass(frozen=True)
class PartMatch:
    node: gs.Node
    x: gs.Tensor
    rotary: gs.Node
    width: int


class RotateWholeHeads(Rewrite[PartMatch]):
    """Concat(RotaryEmbedding(x[..., :R], cos, sin), x[..., R:]) -> RotaryEmbedding(x [B, H, S, D], cos, sin) of R."""

    def match(self, node: gs.Node) -> PartMatch | Reject | None:
        rotary = producer(node.inputs[0], "RotaryEmbedding") if node.op == "Concat" else None
        if rotary is None:
            return None
        slices = [producer(t, "Slice") for t in (rotary.inputs[0], *node.inputs[1:])]
        x = slices[0].inputs[0] if slices[0] is not None else None
        if x is None or x.shape is None or len(x.shape) != 4 or len(slices) != 2 or node.attrs["axis"] not in (-1, 3):
            return Reject("what is rotated is no part of a head")
        if any(each is None or each.inputs[0] is not x or len(each.inputs) != 5 for each in slices):
            return Reject(f"the parts of a head are not slices of {x.name}")
        first, rest = (last_slice(each, 3) for each in slices if each is not None)
        width = first[1] if first is not None else None
        if width is None or first != (0, width) or rest not in ((width, None), (width, x.shape[3])):
            return Reject(f"the slices of {x.name} are not the beginning and the rest of a head")
        return PartMatch(node, x, rotary, width)

    def rewrite(self, graph: gs.Graph, match: PartMatch) -> None:
        attrs = {**match.rotary.attrs, "rotary_embedding_dim": match.width}
        inputs = [match.x, *match.rotary.inputs[1:]]
        add(graph, "RotaryEmbedding", inputs, take_over(match.node), name=match.rotary.name, **attrs)
