"""Sorted inputs: the same numbers out, at the price of a Gather or of nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx.reference import ReferenceEvaluator

from instantrt.passes.core.lazy import Array, InMemory, View
from instantrt.passes.core.linear import linear, weight_constant
from instantrt.passes.core.quant import Codes, InstantQuant, Order, QuantTensor
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.qdq.fold_order import FoldOrder
from instantrt.passes.qdq.insert_qdq import InsertDequantize, quantized
from instantrt.passes.qdq.permuted import Permuted
from instantrt.passes.qdq.sort_inputs import SortInputs

K, N = 32, 64
RANDOM = np.random.default_rng(5)
F32 = np.dtype(np.float32)
Build = Callable[[gs.Graph, gs.Tensor], None]


def matrix(n: int, k: int) -> Array:
    return RANDOM.standard_normal((n, k)).astype(np.float32)


def graph_of(build: Build) -> gs.Graph:
    """x [2, K] -> whatever `build` makes of it."""
    x = gs.Variable("x", np.float32, [2, K])
    graph = gs.Graph([], [x], [], opset=23)
    build(graph, x)
    return graph.toposort()


def layer(graph: gs.Graph, x: gs.Tensor, path: str, n: int = N, k: int = K, bias: bool = False) -> gs.Tensor:
    out = add(graph, "MatMul", [x, weight_constant(path, InMemory(matrix(n, k)), (n, k))], f"{path}.out", name=path)
    if bias:
        values = View(InMemory(matrix(1, n)[0]), (n,), np.float32)
        out = add(graph, "Add", [out, gs.Constant(f"{path}.bias", values)], f"{path}.biased")
    out.dtype, out.shape = np.dtype(np.float32), [2, n]
    return out


def output(graph: gs.Graph, *tensors: gs.Tensor) -> None:
    for tensor in tensors:
        tensor.dtype, tensor.shape = np.dtype(np.float32), tensor.shape or [2, N]
        graph.outputs.append(tensor)


def order_of(k: int, seed: int) -> Order:
    return Order.of(np.random.default_rng(seed).permutation(k))


def sorted_quant(graph: gs.Graph, orders: dict[str, Order | None]) -> dict[str, QuantTensor]:
    """InstantQuant of every layer, in groups of 16 sorted inputs."""
    decisions = {}
    for node in graph.nodes:
        if (found := linear(node)) is None:
            continue
        order, (_, k) = orders.get(found.path), found.shape
        rows = np.concatenate([t.parts[0] for t in found.rows.tiles()])
        source = InMemory(rows if order is None else np.ascontiguousarray(rows[:, order.indices]))
        instant = InstantQuant(found.path, source, 8, 16, False, F32)
        decisions[found.path] = QuantTensor(found.path, instant, found.shape, 8, 16, False, F32, order=order)
        assert k % 16 == 0
    return decisions


def evaluate(graph: gs.Graph, x: Array) -> list[Array]:
    loaded = graph.copy()
    for tensor in loaded.tensors().values():
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, View):
            tensor.values = tensor._values.load()
    return ReferenceEvaluator(gs.export_onnx(loaded.cleanup().toposort())).run(None, {"x": x})


def check(build: Build, orders: dict[str, Order | None]) -> tuple[gs.Graph, PassLog]:
    """Runs the passes; the result computes what the unfolded weights compute in the model's own order."""
    graph = graph_of(build)
    decisions = sorted_quant(graph, orders)
    plain = {  # the same codes with their inputs put back, which needs no order: groups of one input
        path: replace(q, source=Unsorted(q), group_size=1, order=None) for path, q in decisions.items()
    }
    expected_graph, log = graph.copy(), PassLog()
    run(expected_graph, (InsertDequantize(plain),), PassLog())
    fold = FoldOrder(frozenset(t.name for t in graph.outputs))
    run(graph, (SortInputs(decisions), InsertDequantize(decisions), fold), log)
    x = matrix(2, K)
    for expected, found in zip(evaluate(expected_graph, x), evaluate(graph, x), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    return graph, log


class Unsorted:
    """A sorted weight in the model's own order, every input its own group."""

    def __init__(self, quant: QuantTensor) -> None:
        self.quant = quant

    def tiles(self):
        for start, (codes, scale, zero) in self.quant.tiles():
            k = codes.shape[1]
            back = np.arange(k) if self.quant.order is None else np.argsort(self.quant.order.indices)
            wide = [np.repeat(each, 16, axis=1)[:, back] for each in (scale, zero)]
            yield type(next(iter(self.quant.tiles())))(start, Codes(codes[:, back], *wide))


def gathers(graph: gs.Graph) -> int:
    return sum(node.op == "Gather" for node in graph.nodes)


def mlp(graph: gs.Graph, x: gs.Tensor) -> None:
    gate, up = layer(graph, x, "gate", bias=True), layer(graph, x, "up")
    silu = add(graph, "Mul", [gate, add(graph, "Sigmoid", [gate], "sigmoid")], "silu")
    product = add(graph, "Mul", [silu, up], "product")
    output(graph, layer(graph, product, "down", k=N))


def test_down_folds_into_gate_and_up() -> None:
    graph, log = check(mlp, {"down": order_of(N, 1)})
    assert gathers(graph) == 0
    (entry,) = log.applied(FoldOrder)
    assert entry.done == "folded into the output channels of gate, up"
    down = next(q for node in graph.nodes if (q := quantized(node)) is not None and q.path == "down")
    gate = next(q for node in graph.nodes if (q := quantized(node)) is not None and q.path == "gate")
    assert not isinstance(down.quant.source, Permuted)
    assert isinstance(gate.quant.source, Permuted)


def test_a_chain_of_orders_folds_link_by_link() -> None:
    graph, _ = check(mlp, {"down": order_of(N, 1), "gate": order_of(K, 2), "up": order_of(K, 2)})
    assert gathers(graph) == 1  # gate and up share one, on the graph's input


def test_different_orders_of_one_input_keep_a_gather_each() -> None:
    def two(graph: gs.Graph, x: gs.Tensor) -> None:
        y = layer(graph, x, "first")
        output(graph, layer(graph, y, "a", k=N), layer(graph, y, "b", k=N), layer(graph, y, "c", k=N))

    graph, log = check(two, {"a": order_of(N, 1), "b": order_of(N, 2), "c": order_of(N, 1)})
    assert gathers(graph) == 2
    assert all("also go to" in e.reason for e in log.rejected())


def test_one_order_for_all_consumers_folds() -> None:
    def two(graph: gs.Graph, x: gs.Tensor) -> None:
        y = layer(graph, x, "first", bias=True)
        output(graph, layer(graph, y, "a", k=N), layer(graph, y, "b", k=N))

    graph, _ = check(two, {"a": order_of(N, 1), "b": order_of(N, 1)})
    assert gathers(graph) == 0


def test_a_norm_takes_the_order_through_its_weight() -> None:
    def normed(graph: gs.Graph, x: gs.Tensor) -> None:
        y = layer(graph, x, "first")
        weight = gs.Constant("norm.weight", View(InMemory(matrix(1, N)[0]), (N,), np.float32))
        y = add(graph, "RMSNormalization", [y, weight], "normed", axis=-1, epsilon=1e-6)
        output(graph, layer(graph, y, "last", k=N))

    graph, _ = check(normed, {"last": order_of(N, 1)})
    assert gathers(graph) == 0


@pytest.mark.parametrize("kind", ["residual", "graph output", "reshape"])
def test_what_must_keep_its_order_keeps_a_gather(kind: str) -> None:
    def build(graph: gs.Graph, x: gs.Tensor) -> None:
        y = layer(graph, x, "first")
        shape = gs.Constant("shape", np.array([2, N], np.int64))
        inner = add(graph, "Reshape", [y, shape], "reshaped") if kind == "reshape" else add(graph, "Relu", [y], "relu")
        inner.shape, inner.dtype = [2, N], np.dtype(np.float32)
        z = layer(graph, inner, "last", n=N, k=N)
        others = {"residual": lambda: [add(graph, "Add", [z, y], "sum")], "graph output": lambda: [z, inner]}
        output(graph, *others.get(kind, lambda: [z])())

    graph, log = check(build, {"last": order_of(N, 1)})
    assert gathers(graph) == 1
    assert log.rejected()


def test_permuted_rows_of_codes_and_of_floats() -> None:
    order = order_of(N, 3)
    rows = matrix(N, K)
    tiles = list(Permuted(InMemory(rows), order).tiles())
    np.testing.assert_array_equal(np.concatenate([t.parts[0] for t in tiles]), rows[order.indices])
    quant = InstantQuant("w", InMemory(rows), 8, 16, False, F32)
    expected = next(iter(quant.tiles())).parts
    found = [t.parts for t in Permuted(quant, order).tiles()]
    for i, part in enumerate(expected):
        np.testing.assert_array_equal(np.concatenate([p[i] for p in found]), part[order.indices])
