"""Tables of embeddings that a head shares with them -> CpuRows, which reads the head's own codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import view_of
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject, Rewrite, take_over
from instantrt.passes.gemm.packed import Packed, add_ours, attributes, packed_of
from instantrt.plugins.cpu.op import GEMM, ROWS


@dataclass(frozen=True)
class TiedTable:
    node: gs.Node
    head: gs.Node


@dataclass(frozen=True)
class ShareTable(Rewrite[TiedTable]):
    """GatherBlockQuantized(codes, ids) -> instantrt::CpuRows(ids, the constants of the CpuGemm with the same codes).

    heads   those of the run's graph, by the weight
    """

    heads: tuple[tuple[Packed, gs.Node], ...] = ()

    def for_graph(self, graph: gs.Graph) -> ShareTable:
        return ShareTable(tuple((packed_of(node), node) for node in graph.nodes if node.op == GEMM.name))

    def match(self, node: gs.Node) -> TiedTable | Reject | None:
        view = view_of(node.inputs[0]) if node.op == "GatherBlockQuantized" else None
        if view is None or not isinstance(view.source, QuantTensor):
            return None
        head = next((head for packed, head in self.heads if packed.weights == (view.source,)), None)
        if head is None:
            return Reject("no product of ours has its codes")
        if view.source.has_minima:
            return Reject("its minima are gathered apart")
        if node.inputs[1].dtype != np.int64:
            return Reject(f"ids are {node.inputs[1].dtype}, expected int64")
        return TiedTable(node, head)

    def rewrite(self, graph: gs.Graph, match: TiedTable) -> None:
        node, known = match.node, attributes(match.head)
        attrs = {attr.name: known[attr.name] for attr in ROWS.attrs}
        inputs = [node.inputs[1], *match.head.inputs[1:3]]
        add_ours(graph, ROWS.name, inputs, [take_over(node)], node.name, attrs)
