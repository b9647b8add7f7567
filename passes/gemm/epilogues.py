"""What follows a product of ours and can happen inside it, before its one rounding: bias, SiLU, GELU, gate times up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, producer, take_over
from instantrt.passes.gemm.packed import Packed, add_ours, attributes, interleave, made_by, packed_of, weights
from instantrt.passes.qdq.join_linears import join_paths
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, NONE, SILU

UNBIASED = 3  # x, codes, affine
M = TypeVar("M")
GELUS = {"none": GELU, "tanh": GELU_TANH}  # by the operator's attribute


@dataclass(frozen=True)
class Epilogue:
    """Something after a product that it can do itself: `last` is the node whose output it takes over."""

    node: gs.Node
    last: gs.Node
    inputs: list[gs.Tensor]
    changes: dict[str, int] = field(default_factory=dict)  # of its attributes


@dataclass(frozen=True)
class Fusion(Rewrite[M]):
    """A value that is an output of the model itself stays one, and nothing is fused over it: `kept` has their names."""

    kept: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def for_graph(self, graph: gs.Graph) -> Self:
        return replace(self, kept=frozenset(t.name for t in graph.outputs))

    def sole_gemm(self, tensor: gs.Tensor, user: gs.Node) -> gs.Node | None:
        """The product of ours that makes `tensor`, if nothing but `user` reads it."""
        node = made_by(tensor) if tensor.name not in self.kept else None
        return node if node is not None and all(out is user for out in tensor.outputs) else None


class FuseEpilogue(Fusion[Epilogue]):
    def rewrite(self, graph: gs.Graph, match: Epilogue) -> None:
        node, out = match.node, take_over(match.last)
        add_ours(graph, node.op, match.inputs, [out], node.name, node.attrs | match.changes)


@dataclass(frozen=True)
class FuseBias(FuseEpilogue):
    """Product + Add(constant [N]) -> its bias input. Exact where the bias already has the compute type."""

    def match(self, node: gs.Node) -> Epilogue | Reject | None:
        if node.op != "Add":
            return None
        for y, bias in (node.inputs, node.inputs[::-1]):
            made = self.sole_gemm(y, node)
            if made is None or not isinstance(bias, gs.Constant) or len(made.inputs) != UNBIASED:
                continue
            packed = packed_of(made)
            if tuple(bias.shape) != packed.shape[:1] or np.dtype(bias.dtype) != packed.bias_type:
                return Reject(f"the bias is {np.dtype(bias.dtype)} {tuple(bias.shape)}")
            if attributes(made)["activation"] != NONE or attributes(made)["gated"]:
                continue
            return Epilogue(made, node, [*made.inputs, bias])
        return None


@dataclass(frozen=True)
class FuseSilu(FuseEpilogue):
    """y * Sigmoid(y) -> the activation of the product that makes y."""

    def match(self, node: gs.Node) -> Epilogue | Reject | None:
        if node.op != "Mul":
            return None
        for y, gate in (node.inputs, node.inputs[::-1]):
            sigmoid, made = producer(gate, "Sigmoid"), made_by(y)
            if made is None or sigmoid is None or sigmoid.inputs[0] is not y or attributes(made)["activation"] != NONE:
                continue
            if (
                any(user is not node and user is not sigmoid for user in y.outputs)
                or len(gate.outputs) != 1
                or {y.name, gate.name} & self.kept
            ):
                return Reject("another node reads the value before its activation")
            return Epilogue(made, node, list(made.inputs), {"activation": SILU})
        return None


@dataclass(frozen=True)
class FuseGeluEpilogue(FuseEpilogue):
    """Gelu(y) -> the activation of the product that makes y."""

    def match(self, node: gs.Node) -> Epilogue | Reject | None:
        made = made_by(node.inputs[0]) if node.op == "Gelu" else None
        if made is None or attributes(made)["activation"] != NONE:
            return None
        if self.sole_gemm(node.inputs[0], node) is None:
            return Reject("another node reads the value before its activation")
        return Epilogue(made, node, list(made.inputs), {"activation": GELUS[node.attrs.get("approximate", "none")]})


@dataclass(frozen=True)
class GatePair:
    """`biases` are of both or of neither."""

    gate: gs.Node
    up: gs.Node
    last: gs.Node
    packed: Packed
    biases: tuple[gs.Constant, ...]


@dataclass(frozen=True)
class FuseGateUp(Fusion[GatePair]):
    """act(gate(x) + b) * (up(x) + c) -> one product whose rows alternate, and half its outputs."""

    def match(self, node: gs.Node) -> GatePair | Reject | None:
        if node.op != "Mul" or len(node.inputs) != 2:
            return None
        made = [m for m in (self.sole_gemm(t, node) for t in node.inputs) if m is not None]
        gates = [m for m in made if attributes(m)["activation"] != NONE]
        if len(made) != 2 or len(gates) != 1:
            return None
        gate, up = gates[0], made[1 - made.index(gates[0])]
        if attributes(gate) | {"activation": NONE} != attributes(up) or gate.inputs[0] is not up.inputs[0]:
            return Reject("gate and up differ in format or input")
        if len(gate.inputs) != len(up.inputs):
            return Reject("one of gate and up has a bias")
        if packed_of(gate).shape != packed_of(up).shape:
            return Reject("gate and up differ in shape")
        biases = (*gate.inputs[UNBIASED:], *up.inputs[UNBIASED:])
        return GatePair(gate, up, node, packed_of(gate).beside(packed_of(up)), biases)

    def rewrite(self, graph: gs.Graph, match: GatePair) -> None:
        gate, name, out = match.gate, join_paths([match.gate.name, match.up.name]), take_over(match.last)
        inputs = [gate.inputs[0], *weights(graph, match.packed, name)]
        if match.biases:
            rows = interleave(tuple(bias.values.reshape(-1, 1) for bias in match.biases))
            inputs.append(gs.Constant(f"{name}.bias", rows.reshape(-1)))
        add_ours(graph, gate.op, inputs, [out], name, gate.attrs | {"gated": 1})


EPILOGUES = (FuseBias(), FuseSilu(), FuseGeluEpilogue(), FuseGateUp())  # in this order
