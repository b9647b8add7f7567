"""Tables of embeddings in codes, as ONNX Runtime gathers them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import BFLOAT16, Source, View, first_part, view_of
from instantrt.passes.core.quant import Quantizer, QuantTensor, scales_of, zeros_of
from instantrt.passes.core.rewrite import Prefixed, Reject, Rewrite, add, take_over
from instantrt.passes.core.subgraphs import tensors
from instantrt.passes.core.verify import tables_are_float32
from instantrt.passes.ort.nbits import Blocks
from instantrt.passes.ort.zeros import Filled, minima
from instantrt.passes.qdq.tables import TABLE_BLOCKS, Table, stored_table, table

SCALE_TYPE = BFLOAT16  # of weights that are quantized here: float16 ends where the weights of some models begin


@dataclass(frozen=True)
class QuantizeTables(Rewrite[Table]):
    """Gather(table [V, H], ids) -> com.microsoft.GatherBlockQuantized in blocks along H.

    A table that the checkpoint has in codes keeps them; its minima are gathered apart, and added. Others become 8 bits,
    asymmetric, where `floats` says so. A tied head that was quantized so is what the table becomes: the artifact then
    holds one of the two.
    """

    requires = (tables_are_float32,)

    floats: bool = True
    linears: tuple[QuantTensor, ...] = field(default=(), repr=False, compare=False)  # of a run's graph
    tied: Mapping[Source, QuantTensor] = field(default_factory=dict, repr=False, compare=False)  # of these, by weight

    def for_graph(self, graph: gs.Graph) -> QuantizeTables:
        views = [view for t in tensors(graph).values() if (view := view_of(t)) is not None]
        linears = tuple(dict.fromkeys(v.source for v in views if isinstance(v.source, QuantTensor)))
        tied = {q.source.weight: q for q in linears if isinstance(q.source, Quantizer) and may_be_table(q)}
        return replace(self, linears=linears, tied=tied)

    def match(self, node: gs.Node) -> Table | Reject | None:
        stored = stored_table(node, self.linears)
        if stored is not None:
            rank = not stored.quant.has_minima or node.inputs[1].shape is not None
            return stored if rank else Reject("its rows have minima, and the rank of the ids is not known")
        return table(node, SCALE_TYPE, self.tied) if self.floats else None

    def rewrite(self, graph: gs.Graph, match: Table) -> None:
        q, node, name = match.quant, match.node, match.node.inputs[0].name
        ids, out = node.inputs[1], take_over(node)
        v, h = q.shape
        codes, zeros = first_part, zeros_of
        if q.bits == 4:
            layout = Blocks(q.bits, q.group_size, q.groups, q.groups)
            codes, zeros = layout.rows, layout.zeros
        width, zero_shape = h * q.bits // 8, (v, -(-q.groups * q.bits // 8))
        zero = View(q, zero_shape, np.uint8, project=zeros)
        if q.has_minima:
            zero = View(Filled(zero_shape, 0), zero_shape, np.uint8)
        inputs = [
            gs.Constant(f"{name}.codes", View(q, (v, width), np.uint8, project=codes)),
            ids,
            gs.Constant(f"{name}.scales", View(q, (v, q.groups), np.float32, project=scales_of)),
            gs.Constant(f"{name}.zeros", zero),
        ]
        attrs = {"bits": q.bits, "block_size": q.group_size, "gather_axis": 0, "quantize_axis": 1}
        steps = f"{name}/steps" if q.has_minima else out
        rows = add(graph, "GatherBlockQuantized", inputs, steps, domain="com.microsoft", name=node.name, **attrs)
        if q.has_minima:
            add_minima(graph, q, rows, ids, out, name)

    def note(self, match: Table) -> str:
        shared = f", one table with {match.quant.name}" if match.quant in self.linears else ""
        return f"GatherBlockQuantized, {match.quant.bits} bits{shared}"


def add_minima(graph: gs.Graph, q: QuantTensor, rows: gs.Tensor, ids: gs.Tensor, out: gs.Tensor, name: str) -> None:
    """Adds its minimum to each group of the rows [..., H] of a table."""
    nodes, rank = Prefixed(graph, name), len(ids.shape)
    minimum = nodes("Gather", [minima(q, name), ids], "minima", axis=0)
    minimum = nodes("Unsqueeze", [minimum, nodes.const("axis", [-1], np.int64)], "minimum_by_group")
    by_group = nodes.const("by_group", [0] * rank + [q.groups, q.group_size], np.int64)
    grouped = nodes("Reshape", [rows, by_group], "grouped")
    whole = nodes.const("whole", [0] * rank + [q.shape[1]], np.int64)
    add(graph, "Reshape", [nodes("Add", [grouped, minimum], "shifted"), whole], out)


def may_be_table(q: QuantTensor) -> bool:
    """May a table of embeddings be in the form of this linear?"""
    return q.bits == 8 and q.group_size in TABLE_BLOCKS and not q.has_minima  # GatherBlockQuantized has none
