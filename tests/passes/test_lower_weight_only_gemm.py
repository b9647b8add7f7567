"""Canonical Q/DQ -> WeightOnlyGemm: equal to the twin, packed once, streamed, fused; what it refuses and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array, InMemory, Tile, view_of
from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.quant import Activations, InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.gemm.epilogues import EPILOGUES
from instantrt.passes.qdq.insert_qdq import InsertDequantize
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.lower_weight_only_gemm import LowerWeightOnlyGemm
from instantrt.passes.tensorrt.packed import Fragments
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import DType, Tolerance
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP
from tests.plugins.within import assert_within

F16, BF16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {F16: OP.tolerance[DType.F16], BF16: OP.tolerance[DType.BF16]}
K = 192


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows in tiles of 7: no multiple of anything that packing wants."""

    rows: Array

    def tiles(self) -> Iterator[Tile]:
        for start in range(0, len(self.rows), 7):
            yield Tile(start, (self.rows[start : start + 7],))


class Network:
    """Linears of one input, quantized canonically, ready for whatever follows them."""

    def __init__(self, bits: int = 4, group: int = 64, dtype: np.dtype[Any] = F16, symmetric: bool = False) -> None:
        self.bits, self.group, self.dtype, self.symmetric = bits, group, dtype, symmetric
        self.random = np.random.default_rng(7)
        self.x = gs.Variable("x", np.float32, ("M", K))
        self.graph = gs.Graph(inputs=[self.x], opset=23)
        self.decisions: dict[str, QuantTensor] = {}

    def linear(self, name: str, n: int = 144, activations: Activations = "float") -> gs.Tensor:
        w = (self.random.standard_normal((n, K)) / np.sqrt(K)).astype(np.float32)
        source = InstantQuant(name, Ragged(w), self.bits, self.group, self.symmetric, self.dtype)
        self.decisions[name] = QuantTensor(
            name, source, (n, K), self.bits, self.group, self.symmetric, self.dtype, activations
        )
        inputs = [self.x, weight_constant(name, InMemory(w), w.shape)]
        return add(self.graph, "MatMul", inputs, gs.Variable(f"{name}.y", np.float32, ("M", n)), name=name)

    def node(self, op: str, inputs: list[gs.Tensor], name: str, n: int = 144) -> gs.Tensor:
        return add(self.graph, op, inputs, gs.Variable(name, np.float32, ("M", n)))

    def bias(self, y: gs.Tensor, name: str, n: int = 144) -> gs.Tensor:
        values = self.random.standard_normal(n).astype(self.dtype).astype(np.float32)
        return self.node("Add", [y, gs.Constant(f"{name}.bias", values)], name, n)

    def compile(self, *outputs: gs.Tensor) -> tuple[gs.Graph, gs.Graph, PassLog]:
        """-> the twin, the lowered graph in the compute type, what the lowering said."""
        self.graph.outputs = list(outputs)
        run(self.graph, [InsertDequantize(self.decisions), QuantizeActivations()], PassLog())
        twin, log = self.graph.copy(), PassLog()
        lowered = run(self.graph, cast_compute_type(self.dtype), PassLog())
        run(lowered, [LowerWeightOnlyGemm(self.dtype), *EPILOGUES], log)
        return twin, lowered, log

    def check(self, twin: gs.Graph, lowered: gs.Graph, roundings: int = 1) -> None:
        """`roundings` counts the values rounded to the compute type on the way to an output; their sum may cancel."""
        bound = TOLERANCE[self.dtype]
        bound = Tolerance(bound.frobenius * roundings, bound.element * roundings)
        slack = 1 if roundings == 1 else 2**12
        x = self.random.standard_normal((5, K)).astype(self.dtype).astype(np.float32)
        for out in twin.outputs:
            exact = Evaluation(twin, {"x": x}).take(out.name).astype(np.float64)
            actual = Evaluation(lowered, {"x": x}).take(out.name)
            assert_within(actual, exact, np.abs(exact) + slack, bound)


def ops(graph: gs.Graph) -> list[str]:
    return sorted(node.op for node in graph.nodes if node.op != "Cast")


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 64, False), (4, 96, True), (8, 32, False), (8, K, False)])
def test_equals_the_twin(bits: int, group: int, symmetric: bool, dtype: np.dtype[Any]) -> None:
    net = Network(bits, group, dtype, symmetric)
    twin, lowered, log = net.compile(net.linear("layer"))
    assert ops(lowered) == ["WeightOnlyGemm"]
    assert {each.domain: each.version for each in lowered.import_domains} == {"": lowered.opset, DOMAIN: OP.version}
    assert log.entries[0].done == "WeightOnlyGemm"
    net.check(twin, lowered)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, 64, True), (4, 64, False), (4, 32, True), (4, K, False)])
def test_int8_activations_equal_the_twin(bits: int, group: int, symmetric: bool) -> None:
    net = Network(bits, group, F16, symmetric)
    twin, lowered, _ = net.compile(net.linear("layer", activations="int8"))
    assert ops(lowered) == ["WeightOnlyGemm"], "the Q/DQ pair in front is inside the plugin"
    assert lowered.nodes[1].attrs["activation_bits"] == 8
    net.check(twin, lowered)


def test_per_channel_int8_activations_are_left_to_tensorrt() -> None:
    net = Network(8, K, F16, symmetric=True)
    _, lowered, log = net.compile(net.linear("layer", activations="int8"))
    assert "WeightOnlyGemm" not in ops(lowered)
    assert log.entries == []


def test_bias_activation_and_gate_up_are_fused() -> None:
    net = Network()
    gate, up = net.linear("gate"), net.linear("up")
    silu = net.node("Mul", [gate, net.node("Sigmoid", [gate], "s")], "silu")
    product = net.node("Mul", [up, silu], "product")
    twin, lowered, _ = net.compile(product, net.bias(net.linear("biased"), "sum"))
    assert ops(lowered) == ["WeightOnlyGemm", "WeightOnlyGemm"]
    fused = next(node for node in lowered.nodes if node.name == "(gate+up)")
    assert (fused.attrs["gated"], fused.attrs["activation"]) == (1, 1)
    assert OP.bind([(1, K), *(t.shape for t in fused.inputs[1:])], {**attrs(fused)}) == ((1, 144),)
    net.check(twin, lowered)


@pytest.mark.parametrize(("approximate", "activation"), [("none", 2), ("tanh", 3)])
def test_gelu_is_the_activation(approximate: str, activation: int) -> None:
    net = Network()
    y = net.bias(net.linear("layer"), "sum")
    y = add(net.graph, "Gelu", [y], gs.Variable("gelu", np.float32, ("M", 144)), approximate=approximate)
    twin, lowered, _ = net.compile(y)
    assert ops(lowered) == ["WeightOnlyGemm"]
    assert lowered.nodes[1].attrs["activation"] == activation
    net.check(twin, lowered)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_a_gate_pair_brings_its_biases(dtype: np.dtype[Any]) -> None:
    """Gemma's GeGLU, with biases: they alternate as the rows do, and are added before activation and product."""
    net = Network(dtype=dtype)
    gate, up = net.bias(net.linear("gate"), "gate.sum"), net.bias(net.linear("up"), "up.sum")
    gelu = add(net.graph, "Gelu", [gate], gs.Variable("gelu", np.float32, ("M", 144)), approximate="tanh")
    twin, lowered, _ = net.compile(net.node("Mul", [gelu, up], "product"))
    assert ops(lowered) == ["WeightOnlyGemm"]
    (node,) = (n for n in lowered.nodes if n.op == OP.name)
    assert (node.attrs["gated"], node.attrs["activation"]) == (1, 3)
    assert OP.bind([(1, K), *(t.shape for t in node.inputs[1:])], {**attrs(node)}) == ((1, 144),)
    net.check(twin, lowered)


def test_a_gate_pair_with_one_bias_is_not_fused() -> None:
    net = Network()
    gate, up = net.bias(net.linear("gate"), "gate.sum"), net.linear("up")
    silu = net.node("Mul", [gate, net.node("Sigmoid", [gate], "s")], "silu")
    _, lowered, log = net.compile(net.node("Mul", [silu, up], "product"))
    assert ops(lowered) == ["Mul", "WeightOnlyGemm", "WeightOnlyGemm"]
    assert log.entries[-1].reason == "one of gate and up has a bias"


def attrs(node: gs.Node) -> dict[str, int]:
    return {a.name: node.attrs[a.name] for a in OP.attrs}


def test_a_value_that_others_read_is_not_fused() -> None:
    net = Network()
    y = net.linear("layer")
    silu = net.node("Mul", [y, net.node("Sigmoid", [y], "s")], "silu")
    twin, lowered, log = net.compile(silu, net.bias(y, "sum"))
    assert ops(lowered) == ["Add", "Mul", "Sigmoid", "WeightOnlyGemm"]
    assert "another node reads the value before its activation" in [e.reason for e in log.entries]
    net.check(twin, lowered, roundings=3)


def test_a_graph_output_keeps_its_producer() -> None:
    net = Network()
    y = net.linear("layer")
    twin, lowered, _ = net.compile(y, net.bias(y, "sum"))
    net.check(twin, lowered, roundings=2)


def test_a_bias_of_another_shape_is_not_fused() -> None:
    net = Network()
    _, lowered, log = net.compile(net.node("Add", [net.linear("layer"), gs.Constant("b", np.ones(1, np.float32))], "y"))
    assert ops(lowered) == ["Add", "WeightOnlyGemm"]
    assert log.entries[-1].reason == "the bias is float16 (1,)"


def test_a_shared_weight_is_packed_once() -> None:
    net = Network()
    y = net.linear("layer")
    (first,) = net.graph.nodes
    second = add(net.graph, "MatMul", first.inputs, gs.Variable("second.y", np.float32, ("M", 144)), name="second")
    twin, lowered, _ = net.compile(net.node("Add", [y, second], "y"))
    a, b = (node for node in lowered.nodes if node.op == OP.name)
    assert a.inputs[1] is b.inputs[1]
    assert a.inputs[2] is b.inputs[2]
    net.check(twin, lowered, roundings=2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [16, 144, 272])
def test_streamed_tiles_are_the_packed_whole(n: int, bits: int) -> None:
    net = Network(bits)
    net.linear("layer", n)
    quant = net.decisions["layer"]
    codes, scale, zero = (np.concatenate(p) for p in zip(*(t.parts for t in quant.tiles()), strict=True))
    tiles = list(Fragments((quant,), F16).tiles())
    assert max(len(tile.parts[0]) for tile in tiles) <= layout.TILE_STRIPS
    assert np.array_equal(np.concatenate([t.parts[0] for t in tiles]).reshape(-1), layout.pack(codes, bits).reshape(-1))
    affine = np.concatenate([t.parts[1] for t in tiles], axis=1)
    assert np.array_equal(affine[:, 0::2].T, scale.astype(F16))
    assert np.array_equal(affine[:, 1::2].T, zero.astype(F16))


def test_gate_and_up_alternate_in_strips_of_eight() -> None:
    net = Network()
    net.linear("gate", 144), net.linear("up", 144)
    gate, up = (np.concatenate([t.parts[0] for t in q.tiles()]) for q in net.decisions.values())
    packed = np.concatenate([t.parts[0] for t in Fragments(tuple(net.decisions.values()), F16).tiles()])
    rows = layout.unpack(packed, 4, K).reshape(18, 2, 8, K)
    assert np.array_equal(rows[:, 0].reshape(144, K), gate)
    assert np.array_equal(rows[:, 1].reshape(144, K), up)


@pytest.mark.parametrize(("activations", "expected"), [("float", 1), ("int8", 0)])
def test_weights_are_rounded_only_where_asked(activations: Activations, expected: int) -> None:
    net = Network()
    net.graph.outputs = [net.linear("layer", activations=activations)]
    run(net.graph, [InsertDequantize(net.decisions), QuantizeActivations()], PassLog())
    for rounded, attribute in ((False, 0), (True, expected)):
        lowered = run(net.graph.copy(), [LowerWeightOnlyGemm(F16, rounded)], PassLog())
        (node,) = (n for n in lowered.nodes if n.op == OP.name)
        assert node.attrs["rounded_weights"] == attribute


def test_batch_invariance_reaches_the_node() -> None:
    net = Network()
    net.graph.outputs = [net.linear("layer")]
    run(net.graph, [InsertDequantize(net.decisions), QuantizeActivations()], PassLog())
    for asked in (False, True):
        lowered = run(net.graph.copy(), [LowerWeightOnlyGemm(F16, batch_invariant=asked)], PassLog())
        (node,) = (n for n in lowered.nodes if n.op == OP.name)
        assert node.attrs["batch_invariant"] == asked


def test_refuses_what_the_plugin_does_not_take() -> None:
    net = Network(8, 16)
    _, lowered, log = net.compile(net.linear("layer"))
    assert "WeightOnlyGemm" not in ops(lowered)
    assert log.entries[0].reason == "WeightOnlyGemm: group is 16, expected a multiple of 32 that divides K = 192"
    net = Network()
    _, _, log = net.compile(net.linear("layer", 24))
    assert log.entries[0].reason == "WeightOnlyGemm: N is 24, expected a positive multiple of 16"


def test_a_wrong_scale_is_seen() -> None:
    """The comparison with the twin fails when one scale is off by 1 %."""
    net = Network()
    twin, lowered, _ = net.compile(net.linear("layer"))
    (node,) = (n for n in lowered.nodes if n.op == OP.name)
    affine = node.inputs[2]
    view = view_of(affine)
    assert view is not None
    values = view.load()
    values[1, 2 * 77] *= F16.type(1.01)
    node.inputs[2] = gs.Constant("wrong", values)
    with pytest.raises(AssertionError, match="elements off"):
        net.check(twin, lowered)
