"""What torch's decompositions make of an exported program, without tracing it anew.

Of most models they would leave out checks, casts to the type that is there and dropout, and change nothing else: ONNX
has an operator for each. Tracing again is 40 % of an export, and making types alike a fifth of what is left
(docs/facts.md, "What an export spends its time on").
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout)
NOTHING = (aten._assert_tensor_metadata.default, aten.detach_.default)
OTHER_NAMES = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor}
SLIGHT = (*CASTS, *NOTHING, *OTHER_NAMES)
SIZES = (torch.sym_max, torch.sym_min, *vars(operator).values())  # arithmetic of them


def decomposed(program: ExportedProgram, table: Mapping[Any, Any]) -> ExportedProgram:
    """The program in operators that ONNX has; traced anew where that takes more than leaving out what does nothing.

    table   decompositions of operators that ONNX has none for
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    if not all(is_slight(node) or stays(node.target, table) for node in calls):
        traced: ExportedProgram = ExportedProgram.run_decompositions(program, dict(table))
        return traced
    for node in calls:
        if node.target in OTHER_NAMES:
            node.target = OTHER_NAMES[node.target]
        elif node.target is aten.reshape.default:
            reshape_a_copy(node)
        elif is_slight(node):
            leave_out(node)
    program.graph_module.recompile()
    return program


def is_slight(node: Node) -> bool:
    """Does it nothing but change the type of its input, if that? A program's outputs are known by their names."""
    dropout = node.target is aten.dropout.default and node.args[2] is False
    return (node.target in SLIGHT or dropout) and not any(user.op == "output" for user in node.users)


def stays(target: Any, table: Mapping[Any, Any]) -> bool:
    """Has it no decomposition, and is there nothing that it changes in place?"""
    if isinstance(target, torch._ops.OpOverload):
        return target not in CASTS and target not in table and not target._schema.is_mutable
    return target in SIZES


def reshape_a_copy(node: Node) -> None:
    """With a number for the size that is left open, where it is known."""
    given, sizes = node.all_input_nodes[0], cast("Sequence[Any]", node.args[1])
    known = [
        size if said == -1 and isinstance(size, int) else said
        for said, size in zip(sizes, node.meta["val"].shape, strict=True)
    ]
    copy = before(node, aten.clone.default, memory_format=torch.contiguous_format)
    copy.meta["val"] = given.meta["val"]
    node.target, node.args = aten._unsafe_view.default, (copy, known)


def leave_out(node: Node) -> None:
    """What read it reads its input, or that in another type."""
    if node.target is not aten._assert_tensor_metadata.default:
        given, dtype = node.all_input_nodes[0], node.meta["val"].dtype
        same = dtype == given.meta["val"].dtype
        node.replace_all_uses_with(given if same else before(node, aten._to_copy.default, dtype=dtype))
    node.graph.erase_node(node)


def before(node: Node, target: Any, **how: Any) -> Node:
    """`target` of what `node` is given, in its place and module."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, (node.args[0],), how)
    made.meta = dict(node.meta)
    return made


@contextmanager
def known_values() -> Iterator[None]:
    """torch's pass that makes types alike takes what the trace noted of each operator, and runs those alone that it
    gives casts. It runs all anew, to see what they give, although its casts leave that as it was."""
    from torch.onnx._internal.fx.passes import type_promotion

    def run_node(self: Any, node: Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return Interpreter.run_node(self, node)
        with self._set_current_node(node):
            if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    promotion: Any = type_promotion._TypePromotionInterpreter
    whole, promotion.run_node = promotion.run_node, run_node
    try:
        yield
    finally:
        promotion.run_node = whole
