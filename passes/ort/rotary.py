"""Rotary embeddings inside of GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import small, view_of
from instantrt.passes.core.names import MASK, POSITIONS
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, producer
from instantrt.passes.core.tidy import bodies
from instantrt.passes.ort.cache_by_token import head_size
from instantrt.passes.qdq.last_logits import TO_THE_END

GROUP_QUERY_ATTENTION = "GroupQueryAttention"
WIDTHS = 8  # what the width of a table is a multiple of; a head has at least twice as many channels
SMALL, SHARE = 16 << 20, 1 / 32  # tables of so many bytes, or of this share of the weights', are worth a node a layer
FORWARD, MIXED = np.arange(8)[None], np.array([[3, 1, 0], [2, 2, 5]])  # positions by which a table is known as one


@dataclass(frozen=True)
class RotatedMatch:
    node: gs.Node
    query: gs.Node
    key: gs.Node


@dataclass(frozen=True)
class RotateInAttention(Rewrite[RotatedMatch]):
    """GroupQueryAttention(RotaryEmbedding(q, cos, sin), RotaryEmbedding(k, cos, sin), v) -> the same of q, k, v itself.

    cos, sin [B, S, R/2] become tables [`longest`, R/2] that ONNX Runtime folds when it loads: the nodes that made them
    of position_ids make them of all positions, so each kind of rotation stays what it is. Only the operator's form with
    `query_seqlens` reads each row's own positions in a prompt, too (docs/facts.md, "Rotation inside of
    GroupQueryAttention").
    """

    longest: int  # tokens of a sequence, 0 where it is not known
    graph: gs.Graph = field(default_factory=gs.Graph, repr=False, compare=False)  # of a run, as what follows
    reasons: dict[int, str] = field(default_factory=dict, repr=False, compare=False)  # why it is no table, or ""
    tables: dict[int, gs.Tensor] = field(default_factory=dict, repr=False, compare=False)

    def for_graph(self, graph: gs.Graph) -> RotateInAttention:
        return RotateInAttention(self.longest, graph)

    def match(self, node: gs.Node) -> RotatedMatch | Reject | None:
        if node.op != GROUP_QUERY_ATTENTION or node.attrs.get("do_rotary"):
            return None
        query, key = (producer(t, "RotaryEmbedding") for t in node.inputs[:2])
        if query is None and key is None:
            return None
        if (
            query is None
            or key is None
            or any(a is not b for a, b in zip(query.inputs[1:], key.inputs[1:], strict=True))
        ):
            return Reject("queries and keys are not rotated alike")
        if reason := self.unfit(head_size(node.inputs[3]), *query.inputs[1:]):
            return Reject(reason)
        return RotatedMatch(node, query, key)

    def unfit(self, size: int, cos: gs.Tensor, sin: gs.Tensor) -> str:
        """Why heads of `size` channels cannot be rotated by tables of `cos` and `sin`, or ""."""
        if size % (2 * WIDTHS):
            return f"head size {size} is no multiple of {2 * WIDTHS}"
        for tensor in (cos, sin):
            if id(tensor) not in self.reasons:
                self.reasons[id(tensor)] = self.no_table(tensor)
        return self.reasons[id(cos)] or self.reasons[id(sin)]

    def no_table(self, tensor: gs.Tensor) -> str:
        """Why `tensor` [B, S, R/2] is no function of each token's position alone, or its table would be too long."""
        if not self.longest:
            return "the model does not say how long a sequence may be"
        if all(t.name != POSITIONS or t.dtype != np.int64 for t in self.graph.inputs):
            return f"{POSITIONS} is no input of int64"
        runs = [Evaluation(self.graph, {POSITIONS: positions}) for positions in (FORWARD, MIXED)]
        try:
            if any(len(node.outputs) != 1 or bodies(node) for node in runs[0].needed(tensor.name)):
                return "the rotation is made of branches or parts"
            table, other = (run.take(tensor.name) for run in runs)
        except KeyError as error:
            return f"the rotation depends on {error.args[0]}"
        if not np.array_equal(other, table[0, MIXED]):
            return "the rotation of a token depends on others"
        if table.shape[-1] % WIDTHS:
            return f"{2 * table.shape[-1]} of a head's channels are rotated, which is no multiple of {2 * WIDTHS}"
        size, weights = 2 * 4 * self.longest * table.shape[-1], weight_bytes(self.graph)
        if size > max(SMALL, weights * SHARE):
            return f"tables of {self.longest} positions take {size / 1e6:.0f} MB, the weights {weights / 1e6:.0f} MB"
        return ""

    def rewrite(self, graph: gs.Graph, match: RotatedMatch) -> None:
        node, (_, *angles) = match.node, match.query.inputs
        given = next(t for t in graph.inputs if t.name == POSITIONS)
        if id(given) not in self.tables:
            self.tables[id(given)] = small("rotary/positions", np.arange(self.longest)[None], np.int64)
        inside = self.inside(graph, given)
        cos, sin = (self.table(graph, t) for t in angles)
        for index, tensor in ((0, match.query.inputs[0]), (1, match.key.inputs[0]), (7, cos), (8, sin), (9, inside)):
            node.inputs[index] = tensor
        interleaved = {"rotary_interleaved": 1} if match.query.attrs.get("interleaved") else {}
        node.attrs |= {"do_rotary": 1, **interleaved}

    def inside(self, graph: gs.Graph, given: gs.Tensor) -> gs.Tensor:
        """The positions, those of padding inside of the tables: the operator refuses all others, and should.

        What is padding is said by the last columns of the mask. They are not those of the new tokens where a cache is
        one buffer and the mask as long: there the last position of the tables stands for those behind it.
        """
        nodes = Prefixed(graph, POSITIONS)
        first, last = nodes.const("first", 0, np.int64), nodes.const("last", self.longest - 1, np.int64)
        inside = nodes("Clip", [given, first, last], "inside")
        mask = next((t for t in graph.inputs if t.name == MASK), None)
        if mask is None:
            return inside
        count = nodes("Neg", [nodes("Shape", [given], "count", start=1, end=2)], "from_end")
        to_end, columns = nodes.const("to_end", [TO_THE_END], np.int64), nodes.const("columns", [1], np.int64)
        new = nodes.cast(nodes("Slice", [mask, count, to_end, columns], "new"), np.bool_, "real")
        return nodes("Where", [new, given, inside], "checked")

    def table(self, graph: gs.Graph, tensor: gs.Tensor) -> gs.Tensor:
        """`tensor` [B, S, R/2] of all positions: [longest, R/2], made once."""
        nodes = Prefixed(graph, tensor.name)
        every = self.of_all(graph, tensor)
        return nodes("Squeeze", [every, nodes.const("batch", [0], np.int64)], "table")

    def of_all(self, graph: gs.Graph, tensor: gs.Tensor) -> gs.Tensor:
        """`tensor` with all positions in the place of those given; what does not depend on them stays."""
        if id(tensor) not in self.tables:
            maker = next(iter(tensor.inputs), None)
            inputs = [self.of_all(graph, t) for t in maker.inputs] if maker is not None else []
            if maker is not None and any(a is not b for a, b in zip(inputs, maker.inputs, strict=True)):
                every = add(graph, maker.op, inputs, f"{tensor.name}/all", domain=maker.domain or "", **maker.attrs)
            else:
                every = tensor
            self.tables[id(tensor)] = every
        return self.tables[id(tensor)]


def weight_bytes(graph: gs.Graph) -> int:
    views = (view_of(t) for t in graph.tensors().values())
    return sum(view.nbytes for view in views if view is not None)
