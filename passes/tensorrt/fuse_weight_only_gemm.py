"""What follows a WeightOnlyGemm and can happen inside it, before its one rounding: bias, SiLU, GELU, gate times up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.rewrite import Reject, Rewrite, producer, take_over
from instantrt.passes.tensorrt.lower_weight_only_gemm import attributes, gemm, weights
from instantrt.passes.tensorrt.packed import Packed, interleave, packed_of
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, NONE, SILU

UNBIASED = 3  # x, codes, affine
GELUS = {"none": GELU, "tanh": GELU_TANH}  # by the operator's attribute


@dataclass(frozen=True)
class Epilogue:
    """Something after a WeightOnlyGemm that it can do itself: `last` is the node whose output it takes over."""

    node: gs.Node
    last: gs.Node
    inputs: list[gs.Tensor]
    attrs: dict[str, int]


class FuseEpilogue(Rewrite[Epilogue]):
    def rewrite(self, graph: gs.Graph, match: Epilogue) -> None:
        name, out = match.node.name, take_over(match.last)
        gemm(graph, match.inputs, out, name, match.attrs)


def sole_gemm(tensor: gs.Tensor, user: gs.Node) -> gs.Node | None:
    """The WeightOnlyGemm that makes `tensor`, if nothing but `user` reads it."""
    node = producer(tensor, OP.name)
    return node if node is not None and all(out is user for out in tensor.outputs) else None


@dataclass(frozen=True)
class FuseBias(FuseEpilogue):
    """WeightOnlyGemm + Add(constant [N]) -> its bias input. Exact where the bias already has the compute type."""

    def match(self, node: gs.Node) -> Epilogue | Reject | None:
        if node.op != "Add":
            return None
        for y, bias in (node.inputs, node.inputs[::-1]):
            made = sole_gemm(y, node)
            if made is None or not isinstance(bias, gs.Constant) or len(made.inputs) != UNBIASED:
                continue
            packed = packed_of(made)
            if tuple(bias.shape) != (packed.shape[0],) or np.dtype(bias.dtype) != packed.dtype:
                return Reject(f"the bias is {np.dtype(bias.dtype)} {tuple(bias.shape)}")
            if attributes(made)["activation"] != NONE or attributes(made)["gated"]:
                continue
            return Epilogue(made, node, [*made.inputs, bias], attributes(made))
        return None


@dataclass(frozen=True)
class FuseSilu(FuseEpilogue):
    """y * Sigmoid(y) -> the activation of the WeightOnlyGemm that makes y."""

    def match(self, node: gs.Node) -> Epilogue | Reject | None:
        if node.op != "Mul":
            return None
        for y, gate in (node.inputs, node.inputs[::-1]):
            sigmoid, made = producer(gate, "Sigmoid"), producer(y, OP.name)
            if made is None or sigmoid is None or sigmoid.inputs[0] is not y or attributes(made)["activation"] != NONE:
                continue
            if any(user is not node and user is not sigmoid for user in y.outputs) or len(gate.outputs) != 1:
                return Reject("another node reads the value before its activation")
            return Epilogue(made, node, list(made.inputs), attributes(made) | {"activation": SILU})
        return None


@dataclass(frozen=True)
class FuseGeluEpilogue(FuseEpilogue):
    """Gelu(y) -> the activation of the WeightOnlyGemm that makes y."""

    def match(self, node: gs.Node) -> Epilogue | Reject | None:
        made = producer(node.inputs[0], OP.name) if node.op == "Gelu" else None
        if made is None or attributes(made)["activation"] != NONE:
            return None
        if len(made.outputs[0].outputs) != 1:
            return Reject("another node reads the value before its activation")
        activation = GELUS[node.attrs.get("approximate", "none")]
        return Epilogue(made, node, list(made.inputs), attributes(made) | {"activation": activation})


@dataclass(frozen=True)
class GatePair(Epilogue):
    packed: Packed
    biases: tuple[gs.Constant, ...]  # of both or of neither


@dataclass(frozen=True)
class FuseGateUp(Rewrite[GatePair]):
    """act(gate(x) + b) * (up(x) + c) -> one WeightOnlyGemm whose rows alternate, and half its outputs."""

    def match(self, node: gs.Node) -> GatePair | Reject | None:
        if node.op != "Mul" or len(node.inputs) != 2:
            return None
        made = [m for m in (sole_gemm(t, node) for t in node.inputs) if m is not None]
        gates = [m for m in made if attributes(m)["activation"] != NONE]
        if len(made) != 2 or len(gates) != 1:
            return None
        gate, up = gates[0], made[1 - made.index(gates[0])]
        if attributes(gate) | {"activation": NONE} != attributes(up) or gate.inputs[0] is not up.inputs[0]:
            return Reject("gate and up differ in format or input")
        if len(gate.inputs) != len(up.inputs):
            return Reject("one of gate and up has a bias")
        sources = packed_of(gate), packed_of(up)
        if sources[0].shape != sources[1].shape or sources[0].dtype != sources[1].dtype:
            return Reject("gate and up differ in shape")
        packed = Packed((*sources[0].weights, *sources[1].weights), sources[0].dtype)
        biases = (*gate.inputs[UNBIASED:], *up.inputs[UNBIASED:])
        return GatePair(gate, node, [gate.inputs[0]], attributes(gate) | {"gated": 1}, packed, biases)

    def rewrite(self, graph: gs.Graph, match: GatePair) -> None:
        name, out = match.node.name, take_over(match.last)
        inputs = [*match.inputs, *weights(graph, match.packed, f"{name}+up")]
        if match.biases:
            rows = interleave(tuple(bias.values.reshape(-1, 1) for bias in match.biases))
            inputs.append(gs.Constant(f"{name}+up.bias", rows.reshape(-1)))
        gemm(graph, inputs, out, name, match.attrs)


FUSE_WEIGHT_ONLY_GEMM = (FuseBias(), FuseSilu(), FuseGeluEpilogue(), FuseGateUp())  # in this order
