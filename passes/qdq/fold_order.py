"""A Gather that only reorders channels costs nothing where the channels can be made in that order to begin with.

The order moves up through element-wise operators and norms into the output channels of the linears before:

Before: down(Gather(silu(gate(x)) * up(x), order))
After:  down(silu(gate'(x)) * up'(x))       with the rows of gate', up' and their biases in that order

Every channel is still computed from the same numbers, so this is exact. Where a channel is needed in another order too
(the residual stream, a norm that feeds layers of different orders), the Gather stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import view_of
from instantrt.passes.core.linear import NORMS, linear, weight_dequantize
from instantrt.passes.core.quant import Order, QuantTensor
from instantrt.passes.core.rewrite import Reject, Rewrite
from instantrt.passes.core.verify import activations_are_float
from instantrt.passes.qdq.insert_qdq import quantized
from instantrt.passes.qdq.permuted import Permuted

UNARY = "Abs Cast Clip Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Mish Neg Relu Sigmoid Softplus Sqrt Swish Tanh"
ELEMENTWISE = frozenset((*UNARY.split(), "Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"))


@dataclass(frozen=True)
class FoldMatch:
    """The constants whose last axis takes the order, and the linears they belong to."""

    gather: gs.Node
    order: Order
    constants: tuple[gs.Constant, ...]
    into: tuple[str, ...]


@dataclass(frozen=True)
class FoldOrder(Rewrite[FoldMatch]):
    """Gather(x, order, axis=-1) -> x made in that order. `outputs` are the graph's: their channels stay in place."""

    requires = (activations_are_float,)

    outputs: frozenset[str]

    def match(self, node: gs.Node) -> FoldMatch | Reject | None:
        order = last_axis_order(node)
        if order is None:
            return None
        constants, into, made = list[gs.Constant](), list[str](), list[gs.Tensor]()
        inside, blocked = {id(node)}, ""
        pending = [node.inputs[0]]
        while pending:
            tensor = pending.pop()
            if one_channel(tensor) or any(tensor is t for t in made):
                continue
            if isinstance(tensor, gs.Constant):
                constants.append(tensor)
                continue
            maker = tensor.inputs[0] if tensor.inputs else None
            found = (quantized(maker) or linear(maker)) if maker is not None else None
            if maker is None or (found is None and maker.op not in ELEMENTWISE and not last_axis_norm(maker)):
                blocked = f"the channels come from {maker.op if maker else 'a graph input'} {tensor.name}"
                break
            made.append(tensor)
            inside.add(id(maker))
            if found is not None:
                constants += parameters(maker.inputs[1])
                into.append(found.path)
            else:
                pending += maker.inputs
        for tensor in made:
            others = [user for user in tensor.outputs if id(user) not in inside]
            if others or tensor.name in self.outputs:
                where = others[0].name if others else "the graph's outputs"
                return Reject(f"the channels of {tensor.name} also go to {where} in their own order")
        if blocked:
            return Reject(blocked)
        for constant in constants:
            if len(constant.outputs) != 1 or not permutable(constant, len(order)):
                return Reject(f"{constant.name} {list(constant.shape)} cannot be reordered")
        return FoldMatch(node, order, tuple(constants), tuple(into))

    def rewrite(self, graph: gs.Graph, match: FoldMatch) -> None:  # noqa: ARG002  (nothing is added to it)
        for constant in match.constants:
            permute(constant, match.order)
        x, (out,) = match.gather.inputs[0], match.gather.outputs
        for user in list(out.outputs):
            user.inputs = [x if t is out else t for t in user.inputs]

    def note(self, match: FoldMatch) -> str:
        return "folded into the output channels of " + ", ".join(sorted(match.into))


def parameters(weight: gs.Tensor) -> list[gs.Constant]:
    """The constants that a linear's weight is made of, each with the output channels last."""
    dq = weight_dequantize(weight)
    if dq is None:
        return [weight]
    return [*dq.inputs, *(user.inputs[1] for user in dq.outputs[0].outputs if user.op == "Add")]


def last_axis_order(node: gs.Node) -> Order | None:
    """The order of a Gather that permutes the last axis of a matrix of known width."""
    if node.op != "Gather" or node.attrs.get("axis") != -1 or not isinstance(node.inputs[1], gs.Constant):
        return None
    indices = node.inputs[1].values
    if indices.ndim != 1 or (np.sort(indices) != np.arange(len(indices))).any():
        return None
    return Order.of(indices)


def one_channel(tensor: gs.Tensor) -> bool:
    """Broadcast over the channels, so in any order."""
    return tensor.shape is not None and (len(tensor.shape) == 0 or tensor.shape[-1] == 1)


def last_axis_norm(node: gs.Node) -> bool:
    return node.op in NORMS and node.attrs.get("axis", -1) == -1


def permutable(constant: gs.Constant, count: int) -> bool:
    """Its last axis is the channels, and its tiles run along that axis."""
    view = view_of(constant)
    return constant.shape[-1] == count and (view is None or view.axis == len(view.shape) - 1)


def permute(constant: gs.Constant, order: Order) -> None:
    view = view_of(constant)
    if view is None:
        constant.values = constant.values[..., order.indices]
        return
    q = view.source
    source = replace(q, source=Permuted(q.source, order)) if isinstance(q, QuantTensor) else Permuted(q, order)
    constant.values = view.over(source)
