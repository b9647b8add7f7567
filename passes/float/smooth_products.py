"""What is loud in a gated product, which a linear of int8 inputs reads, goes from the rows before it to its columns.

y = W (g * (U h)) = (W diag(f)) (g * (diag(1 / f) U h)), as `smooth_inputs` does behind a norm. Rows of U have scales of
their own, so that nothing is paid for it there (docs/facts.md, "Loud inputs of a causal LM").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, convert, small
from instantrt.passes.core.linear import Linear, bias_behind, linear, weight_constant
from instantrt.passes.core.rewrite import Reject, ints
from instantrt.passes.float.scaled import ScaledRows, Scaling, scaled


@dataclass(frozen=True)
class Factor:
    """What is multiplied: `width` rows of the linear `made`, from `first` on, behind its `bias` or none.

    bias      an Add, and which of its inputs is the constant
    divided   names of the tensors in between
    """

    made: Linear
    first: int
    width: int
    bias: tuple[gs.Node, int] | None
    divided: tuple[str, ...]


@dataclass(frozen=True)
class SmoothProductMatch:
    factor: Factor
    factors: Array
    into: tuple[Linear, ...]


@dataclass(frozen=True)
class SmoothProducts(Scaling[SmoothProductMatch]):
    """x = Mul(g, MatMul(h, U)), MatMul(x, W [K, N]) -> the same of U's columns over f, and diag(f) W.

    U may have a bias behind it, and other parts beside it in one matrix.

    factors     name of x -> f [K] float32, powers of two: every product is the same number
    quantized   paths of the linears whose inputs will be int8
    """

    factors: Mapping[str, Array] = field(repr=False, compare=False)
    quantized: frozenset[str]

    def match(self, node: gs.Node) -> SmoothProductMatch | Reject | None:
        if node.op != "Mul" or node.outputs[0].name not in self.factors:
            return None
        x, factor = node.outputs[0], factor_of(node.outputs[0])
        into = tuple(found for user in x.outputs if (found := linear(user)) is not None)
        quantized = all(found.path in self.quantized for found in into)
        if factor is None or not quantized or factor.width != len(self.factors[x.name]):
            return None
        if len(into) < len(x.outputs) or not self.outputs.isdisjoint((x.name, *factor.divided)):
            return Reject("something else reads the product, or what is multiplied, too")
        return self.read_elsewhere((*into, factor.made)) or SmoothProductMatch(factor, self.factors[x.name], into)

    def rewrite(self, graph: gs.Graph, match: SmoothProductMatch) -> None:  # noqa: ARG002  (nothing is added to it)
        factor, made = match.factor, match.factor.made
        inverse = np.ones(made.shape[0], np.float32)
        inverse[factor.first : factor.first + factor.width] = 1 / match.factors
        rows = ScaledRows(made.rows, inverse.tobytes())
        made.node.inputs[1] = weight_constant(made.path, rows, made.shape)
        if factor.bias is not None:
            add, at = factor.bias
            values = convert(add.inputs[at].values, FLOAT32) * inverse
            add.inputs[at] = small(f"{made.path}/smoothed/bias", values, FLOAT32)
        for found in match.into:
            found.node.inputs[1] = scaled(found, match.factors)

    def note(self, match: SmoothProductMatch) -> str:
        low, high = match.factors.min(), match.factors.max()
        names = ", ".join(found.path for found in match.into)
        return f"factors {low:g} to {high:g}, from {match.factor.made.path} into {names}"


def factor_of(x: gs.Tensor) -> Factor | None:
    """The linear whose outputs are multiplied by something else in x, each by its own, and go nowhere else."""
    product = x.inputs[0] if len(x.inputs) == 1 and x.inputs[0].op == "Mul" else None
    found = map(rows_behind, product.inputs) if product is not None else ()
    return next((factor for factor in found if factor is not None), None)


def rows_behind(tensor: gs.Tensor) -> Factor | None:
    node, split, divided = maker(tensor), None, [tensor.name]
    along = node is not None and node.attrs.get("axis") in (-1, len(tensor.shape or ()) - 1)
    if node is not None and node.op == "Split" and along and "split" not in node.attrs:
        split, node = node, maker(node.inputs[0])
        divided.append(split.inputs[0].name)
    added = node if node is not None and node.op == "Add" else None
    below = [maker(t) for t in added.inputs] if added is not None else [node]
    made = next((found for each in below if each is not None and (found := linear(each)) is not None), None)
    bias = bias_behind(made.node, made.shape[0]) if made is not None and added is not None else None
    if made is None or (bias is None) != (added is None):
        return None
    divided.append(made.node.outputs[0].name)
    if split is None:
        return Factor(made, 0, made.shape[0], bias, tuple(divided))
    sizes, index = widths(split, made.shape[0]), next(i for i, t in enumerate(split.outputs) if t is tensor)
    whole = sum(sizes) == made.shape[0]
    return Factor(made, sum(sizes[:index]), sizes[index], bias, tuple(divided)) if whole else None


def widths(split: gs.Node, whole: int) -> list[int]:
    """Of the parts; without sizes all but the last are alike."""
    if len(split.inputs) == 2:
        return ints(split.inputs[1]) or []
    count = len(split.outputs) - 1
    each = -(-whole // (count + 1))
    return [each] * count + [whole - each * count]


def maker(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes it for one reader alone."""
    return tensor.inputs[0] if len(tensor.inputs) == len(tensor.outputs) == 1 else None
