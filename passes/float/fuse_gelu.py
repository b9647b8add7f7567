"""Brings decomposed GELUs back to the operator of opset 20."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx_graphsurgeon as gs
from numpy.polynomial import Polynomial

from instantrt.passes.core.rewrite import Reject, Rewrite, add, producer, scalar, take_over, widened

ROOT = math.sqrt(2 / math.pi)
# approximate: f, and the polynomial p of f(p(x)) by its coefficients
FORMS = {"none": ("Erf", (0, math.sqrt(0.5))), "tanh": ("Tanh", (0, ROOT, 0, 0.044715 * ROOT))}
NO_POLYNOMIAL = Polynomial([math.nan])
DEEPEST = 6  # nodes from x to f; what lies further up is no GELU


def divide(a: Polynomial, b: Polynomial) -> Polynomial:
    return a / b.coef[0] if b.degree() == 0 else NO_POLYNOMIAL


def power(a: Polynomial, b: Polynomial) -> Polynomial:
    return a ** int(b.coef[0]) if b.degree() == 0 and b.coef[0] in (2, 3) else NO_POLYNOMIAL


ARITHMETIC: dict[str, Callable[[Polynomial, Polynomial], Polynomial]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Div": divide,
    "Pow": power,
}


@dataclass(frozen=True)
class GeluMatch:
    node: gs.Node
    x: gs.Tensor
    approximate: str


class FuseGelu(Rewrite[GeluMatch]):
    """x * 0.5 * (1 + f(p(x))), multiplied in any order -> Gelu(x).

    f(p(x)) = Erf(x / sqrt(2))                                  approximate = none
    f(p(x)) = Tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))         approximate = tanh

    However p(x) is spelled: transformers has x + 0.044715 * Pow(x, 3), and in gelu_fast x * (1 + 0.044715 * x * x).
    """

    def match(self, node: gs.Node) -> GeluMatch | Reject | None:
        if node.op != "Mul":
            return None
        rejected = None
        for inner, third in (node.inputs, node.inputs[::-1]):
            product = producer(inner, "Mul")
            if product is None:
                continue
            for x, half, shifted in permutations((*product.inputs, third)):
                if not near(half, 0.5):
                    continue
                for approximate, (op, coefficients) in FORMS.items():
                    argument = one_plus(shifted, op)
                    if argument is None:
                        continue
                    if equal(polynomial(argument, x), coefficients):
                        if widened(x, node.outputs[0]):
                            return Reject(f"constants give {x.name} another rank")
                        return GeluMatch(node, x, approximate)
                    rejected = Reject(f"{op} is taken of {argument.name}, which is not GELU's polynomial in {x.name}")
        return rejected

    def rewrite(self, graph: gs.Graph, match: GeluMatch) -> None:
        name, out = match.node.name, take_over(match.node)
        add(graph, "Gelu", [match.x], out, name=name, approximate=match.approximate)


def near(tensor: gs.Tensor, value: float) -> bool:
    """Is it a constant that is `value` in float32?"""
    found = scalar(tensor)
    return found is not None and math.isclose(found, value, rel_tol=1e-6)


def one_plus(tensor: gs.Tensor, op: str) -> gs.Tensor | None:
    """y, if `tensor` is 1 + `op`(y)."""
    node = producer(tensor, "Add")
    for called, one in (node.inputs, node.inputs[::-1]) if node is not None else ():
        inner = producer(called, op)
        if inner is not None and near(one, 1.0):
            return inner.inputs[0]
    return None


def polynomial(tensor: gs.Tensor, x: gs.Tensor, depth: int = DEEPEST) -> Polynomial:
    """`tensor` as a polynomial in `x`; NO_POLYNOMIAL, or what was made of it, where it is none."""
    constant = scalar(tensor)
    if tensor is x or constant is not None:
        return Polynomial([0, 1] if constant is None else [constant])
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op not in ARITHMETIC or not depth:
        return NO_POLYNOMIAL
    return ARITHMETIC[node.op](*(polynomial(t, x, depth - 1) for t in node.inputs))


def equal(found: Polynomial, coefficients: tuple[float, ...]) -> bool:
    """Are the coefficients those, in float32?"""
    return len(found) == len(coefficients) and np.allclose(found.coef, coefficients, rtol=1e-6, atol=0)
