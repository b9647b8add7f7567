"""Brings decomposed GELUs back to the operator of opset 20."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import onnx_graphsurgeon as gs

from passes.rewrite import Reject, Rewrite, add, producer, scalar, take_over


@dataclass(frozen=True)
class GeluMatch:
    node: gs.Node
    x: gs.Tensor
    approximate: str


class FuseGelu(Rewrite[GeluMatch]):
    """x * 0.5 * (1 + f(x)), multiplied in any order -> Gelu(x).

    f(x) = Erf(x / sqrt(2))                                     approximate = none
    f(x) = Tanh(sqrt(2 / pi) * (x + 0.044715 * Pow(x, 3)))      approximate = tanh
    """

    def match(self, node: gs.Node) -> GeluMatch | Reject | None:
        if node.op != "Mul":
            return None
        for inner, third in (node.inputs, node.inputs[::-1]):
            product = producer(inner, "Mul")
            if product is None:
                continue
            for x, half, shifted in permutations((*product.inputs, third)):
                if not near(half, 0.5):
                    continue
                for approximate, argument in (("none", erf_of(shifted)), ("tanh", tanh_of(shifted))):
                    if argument is x:
                        return GeluMatch(node, x, approximate)
        return None

    def rewrite(self, graph: gs.Graph, match: GeluMatch) -> None:
        name, out = match.node.name, take_over(match.node)
        add(graph, "Gelu", [match.x], out, name=name, approximate=match.approximate)


def near(tensor: gs.Tensor, value: float) -> bool:
    """Is it a constant that is `value` in float32?"""
    found = scalar(tensor)
    return found is not None and math.isclose(found, value, rel_tol=1e-6)


def other(tensor: gs.Tensor, op: str, value: float) -> gs.Tensor | None:
    """y, if `tensor` is `op`(y, value) for a commutative op."""
    node = producer(tensor, op)
    if node is None:
        return None
    return next((y for y, constant in (node.inputs, node.inputs[::-1]) if near(constant, value)), None)


def one_plus(tensor: gs.Tensor, op: str) -> gs.Tensor | None:
    """y, if `tensor` is 1 + `op`(y)."""
    called = other(tensor, "Add", 1.0)
    node = producer(called, op) if called is not None else None
    return node.inputs[0] if node is not None else None


def erf_of(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is 1 + Erf(x / sqrt(2))."""
    argument = one_plus(tensor, "Erf")
    quotient = producer(argument, "Div") if argument is not None else None
    if quotient is not None and near(quotient.inputs[1], math.sqrt(2)):
        return quotient.inputs[0]
    return other(argument, "Mul", math.sqrt(0.5)) if argument is not None else None


def tanh_of(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is 1 + Tanh(sqrt(2 / pi) * (x + 0.044715 * Pow(x, 3)))."""
    argument = one_plus(tensor, "Tanh")
    total = other(argument, "Mul", math.sqrt(2 / math.pi)) if argument is not None else None
    addition = producer(total, "Add") if total is not None else None
    for x, cubic in (addition.inputs, addition.inputs[::-1]) if addition is not None else ():
        cube = other(cubic, "Mul", 0.044715)
        power = producer(cube, "Pow") if cube is not None else None
        if power is not None and power.inputs[0] is x and near(power.inputs[1], 3.0):
            return x
    return None
