"""Quantized linears that read one input become one product: q, k and v; gate and up.

Before: y_i = MatMul(x, DequantizeLinear(codes_i [K, N_i], ...)) (+ bias_i), for each i
After:  y_0, y_1, ... = Split(MatMul(x, DequantizeLinear(codes [K, sum N_i], ...)) (+ biases), axis=-1)

Each code, scale and zero point stays what it is; a token's launch and its zero point correction are paid once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import Tile, small
from instantrt.passes.core.linear import bias_behind
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject, Rewrite, add, take_over
from instantrt.passes.core.verify import weight_dq_feeds_matmul
from instantrt.passes.qdq.insert_qdq import Quantized, dequantized, quantized

MARK = "+"


@dataclass(frozen=True)
class Joined:
    """The rows of several weights of one format, below one another."""

    weights: tuple[QuantTensor, ...]

    def tiles(self) -> Iterator[Tile]:
        first = 0
        for weight in self.weights:
            for start, parts in weight.tiles():
                yield Tile(first + start, parts)
            first += weight.shape[0]


@dataclass(frozen=True)
class JoinMatch:
    """`ends` holds each linear's last node: its MatMul, or the Add of its bias. `biases` is empty, or has one each."""

    linears: tuple[Quantized, ...]
    ends: tuple[gs.Node, ...]
    biases: tuple[gs.Constant, ...]

    @property
    def name(self) -> str:
        return join_paths([found.path for found in self.linears])

    @property
    def quant(self) -> QuantTensor:
        weights = tuple(found.quant for found in self.linears)
        rows = sum(weight.shape[0] for weight in weights)
        name = join_paths([weight.name for weight in weights])
        shape = rows, weights[0].shape[1]
        return replace(weights[0], name=name, source=Joined(weights), shape=shape, correction=b"")


@dataclass(frozen=True)
class JoinLinears(Rewrite[JoinMatch]):
    """`gated`: also those that an activation or a Mul reads, as gate and up. The plugin has better forms for them."""

    requires = ensures = (weight_dq_feeds_matmul,)

    gated: bool

    def match(self, node: gs.Node) -> JoinMatch | Reject | None:
        first = quantized(node)
        if first is None:
            return None
        readers = (quantized(user) for user in node.inputs[0].outputs)
        linears = tuple(found for found in readers if found is not None and self.joins(found, first))
        if len(linears) < 2 or linears[0].node is not node:
            return None
        behind = [at for found in linears if (at := bias_behind(found.node, found.quant.shape[0])) is not None]
        if len(behind) == len(linears):
            return JoinMatch(linears, tuple(end for end, _ in behind), tuple(end.inputs[i] for end, i in behind))
        return JoinMatch(linears, tuple(found.node for found in linears), ())

    def joins(self, found: Quantized, first: Quantized) -> bool:
        """Has this linear the format of `first`, its weight for itself, and an output that may be a part of another?"""
        alone = len(found.node.inputs[1].outputs) == 1
        gate = any(user.op in ("Mul", "Sigmoid", "Gelu") for user in end_of(found).outputs[0].outputs)
        return alone and format_of(found.quant) == format_of(first.quant) and (self.gated or not gate)

    def rewrite(self, graph: gs.Graph, match: JoinMatch) -> None:
        outputs = [take_over(end) for end in match.ends]
        x, quant = match.linears[0].node.inputs[0], match.quant
        for found in match.linears:  # else the next of them would be matched again
            found.node.inputs.clear()
            found.node.outputs.clear()
        weight = dequantized(graph, quant, match.name)
        shape = [*outputs[0].shape[:-1], quant.shape[0]] if outputs[0].shape is not None else None
        with_biases, plain = (gs.Variable(name, outputs[0].dtype, shape) for name in outputs_of(match.name))
        y = add(graph, "MatMul", [x, weight], plain, name=match.name)
        if match.biases:
            bias = np.concatenate([bias.values for bias in match.biases])
            y = add(graph, "Add", [y, gs.Constant(f"{match.name}/bias", bias)], with_biases)
        sizes = small(f"{match.name}/sizes", [found.quant.shape[0] for found in match.linears], np.int64)
        graph.nodes.append(gs.Node("Split", f"{match.name}/parts", {"axis": -1}, [y, sizes], outputs))

    def note(self, match: JoinMatch) -> str:
        return match.name


def format_of(quant: QuantTensor) -> tuple[object, ...]:
    """What the parts of one weight must have in common; that they read one x gives them one order of inputs."""
    numbers = quant.shape[1], quant.bits, quant.group_size, quant.symmetric
    return *numbers, quant.scale_dtype, quant.zero_dtype, quant.code_bits, quant.activations


def end_of(found: Quantized) -> gs.Node:
    """The Add of the linear's bias where nothing else reads its product, else its MatMul."""
    behind = bias_behind(found.node, found.quant.shape[0])
    return found.node if behind is None else behind[0]


def join_paths(paths: list[str]) -> str:
    """a.b.q_proj, a.b.k_proj -> a.b.(q_proj+k_proj)."""
    scope = os.path.commonprefix(paths).rpartition(".")[0]  # noqa: RUF071  (whole names: what is behind the last dot)
    rest = MARK.join(path[len(scope) :].lstrip(".") for path in paths)
    return f"{scope}.({rest})" if scope else f"({rest})"


def parts_of(name: str) -> list[str]:
    """The paths of the linears in a joined one; any other name is its own part."""
    scope, opened, rest = name.partition("(")
    return [scope + part for part in rest.removesuffix(")").split(MARK)] if opened and MARK in rest else [name]


def outputs_of(joined: str) -> tuple[str, str]:
    """The tensors that a joined linear may leave all of its parts in: with their biases, and without."""
    return f"{joined}/biased", f"{joined}/y"


def joined_of(tensor: str) -> str | None:
    """The joined linear whose output this is."""
    name, _, kind = tensor.rpartition("/")
    return name if kind in ("biased", "y") and len(parts_of(name)) > 1 else None
