"""Evaluation node by node: equal to ONNX Runtime on the whole graph, sparing with memory, honest about infinities."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import InMemory, View, small
from instantrt.passes.core.node_session import plain_session
from instantrt.passes.core.streaming import BEHIND, behind, distinct
from tests.graphs import evaluate, linear_graph, quantize, relative

RANDOM = np.random.default_rng(3)
WEIGHTS = {name: RANDOM.standard_normal((48, 64)).astype(np.float32) for name in ("a", "b")}
X = RANDOM.standard_normal((2, 5, 64)).astype(np.float32)


@pytest.mark.parametrize(("bits", "group", "activations"), [(8, -1, "float"), (4, 16, "float"), (8, -1, "int8")])
def test_the_twin_is_what_onnx_runtime_makes_of_it(bits: int, group: int, activations: str, tmp_path: Path) -> None:
    graph = quantize(
        linear_graph(WEIGHTS),
        WEIGHTS,
        bits=bits,
        group_size=group,
        activations=activations,  # type: ignore[arg-type]
    )
    run = Evaluation(graph, {"x": X})
    ours = [run.take(f"y.{path}") for path in WEIGHTS]
    theirs = evaluate(graph, {"x": X}, tmp_path)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 2e-6
    assert relative(theirs[0] * np.float32(1.01), theirs[0]) > 2e-6  # the bound bites


def chain(length: int) -> gs.Graph:
    x = gs.Variable("t0", np.dtype(np.float32), ["n"])
    nodes, tensor = [], x
    for i in range(length):
        out = gs.Variable(f"t{i + 1}", np.dtype(np.float32), ["n"])
        nodes.append(gs.Node("Neg", f"neg{i}", {}, [tensor], [out]))
        tensor = out
    return gs.Graph(nodes, [x], [tensor], opset=23)


def test_values_go_when_their_last_reader_has_run() -> None:
    run = Evaluation(chain(5), {"t0": np.ones(3, np.float32)}, keep=["t2"])
    assert (run.take("t5") == -1).all()
    assert set(run.values) == {"t0", "t2"}
    assert (run.take("t2") == 1).all()
    assert set(run.values) == {"t0"}


def test_only_what_is_needed_runs() -> None:
    run = Evaluation(chain(5), {"t3": np.full(2, 7, np.float32)})
    assert [node.name for node in run.needed("t5")] == ["neg3", "neg4"]
    assert (run.take("t5") == 7).all()
    with pytest.raises(KeyError, match="t0"):
        Evaluation(chain(5), {}).needed("t1")


def test_a_table_is_read_by_row_and_sixteen_bits_round_once() -> None:
    table = RANDOM.standard_normal((300, 8)).astype(ml_dtypes.bfloat16)
    ids = np.array([[0, 299, 17], [17, 1, 0]], np.int64)
    names = gs.Variable("ids", np.dtype(np.int64), [2, 3])
    taken = gs.Variable("taken", onnx.TensorProto.BFLOAT16, [2, 3, 8])
    doubled = gs.Variable("y")
    view = gs.Constant("table", View(InMemory(table), table.shape, table.dtype))
    nodes = [
        gs.Node("Gather", "take", {"axis": 0}, [view, names], [taken]),
        gs.Node("Mul", "third", {}, [taken, small("c", 1 / 3, ml_dtypes.bfloat16)], [doubled]),
    ]
    run = Evaluation(gs.Graph(nodes, [names], [doubled], opset=23), {"ids": ids}, keep=["taken"])
    y = run.take("y")
    assert y.dtype == table.dtype
    assert (run.take("taken") == table[ids]).all()
    exact = table[ids].astype(np.float32) * np.float32(ml_dtypes.bfloat16(1 / 3))
    assert (y == exact.astype(ml_dtypes.bfloat16)).all()


def test_a_dequantized_tensor_has_the_type_of_its_scale() -> None:
    """So a product of two of them is rounded to that: an int8 GEMM that writes float16."""
    codes, x = gs.Variable("codes", np.dtype(np.int8), ["n", 64]), gs.Variable("x")
    w, y = View(InMemory(RANDOM.integers(-99, 99, (64, 8)).astype(np.int8)), (64, 8), np.int8), gs.Variable("y")
    step, weight = small("step", 2.0**-7, np.float16), gs.Variable("weight")
    nodes = [
        gs.Node("DequantizeLinear", "tokens", {}, [codes, step], [x]),
        gs.Node("DequantizeLinear", "weights", {}, [gs.Constant("w", w), step], [weight]),
        gs.Node("MatMul", "product", {}, [x, weight], [y]),
    ]
    given = RANDOM.integers(-99, 99, (3, 64)).astype(np.int8)
    got = Evaluation(gs.Graph(nodes, [codes], [y], opset=23), {"codes": given}).take("y")
    want = given.astype(np.float64) @ w.load() / 2**14
    assert got.dtype == np.float16
    assert (got == want.astype(np.float16)).all()
    assert (got != want).any()


@pytest.mark.parametrize(("nodes", "shape", "axis", "dtype"), [
    ("y = MatMul(x, w)", (8,), 0, "float32"),
    ("t = Transpose <perm = [0, 1]> (w) y = MatMul(x, t)", (8, 8), 0, "float32"),
    ("m = Mul(w, twos) y = MatMul(x, m)", (8, 6), 1, "float32"),
    ("u = Unsqueeze(w, first) y = MatMul(x, u)", (8, 6), 1, "float32"),
    ("s = Add(w, hundred) f = Cast <to = 1> (s) y = MatMul(x, f)", (8, 6), 1, "int8"),
])  # fmt: skip
def test_what_looks_like_a_matrix_that_streams(nodes: str, shape: tuple[int, ...], axis: int, dtype: str) -> None:
    """A vector, a transpose that turns nothing, constants that broadcast a matrix, one axis as a scalar, integers."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> g (float[5, 8] x) => (float y) <int64 first = {{0}}, '
        f"float[2, 1, 1] twos = {{2, 2}}, int8 hundred = {{100}}> {{ {nodes} }}"
    )
    values = RANDOM.uniform(-100, 100, shape).astype(dtype)
    graph = gs.import_onnx(model)
    view = View(InMemory(np.moveaxis(values, axis, 0)), shape, dtype, axis=axis, project=lambda t: t.parts[0].T)
    graph.tensors()["w"].to_constant(view if axis else View(InMemory(values), shape, dtype))
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    x = RANDOM.standard_normal((5, 8)).astype(np.float32)
    (want,) = plain_session(model).run(None, {"x": x})
    np.testing.assert_allclose(Evaluation(graph, {"x": x}).take("y"), want, rtol=1e-4, atol=1e-4)


def test_the_first_infinity_is_named_and_a_constant_one_is_not() -> None:
    x = gs.Variable("x", np.dtype(np.float32), ["n"])
    masked, squared, out = (gs.Variable(name) for name in ("masked", "squared", "out"))
    nodes = [
        gs.Node("Min", "mask", {}, [x, small("lowest", -np.inf, np.float32)], [masked]),
        gs.Node("Mul", "square", {}, [x, x], [squared]),
        gs.Node("Add", "sum", {}, [masked, squared], [out]),
    ]
    graph = gs.Graph(nodes, [x], [out], opset=23)
    fine = Evaluation(graph, {"x": np.ones(2, np.float32)})
    fine.take("out")
    assert fine.first_bad is None
    bad = Evaluation(graph, {"x": np.full(2, 1e30, np.float32)})
    bad.take("out")
    assert bad.first_bad == "squared"


def test_rows_that_are_alike_are_multiplied_once() -> None:
    """Bit for bit: zeros of two signs are two rows, and what is no number is as it was."""
    rows = np.array([[1, 2], [0.0, 3], [1, 2], [-0.0, 3], [np.nan, 1], [0.0, 3], [np.nan, 1]], np.float32)
    few, places = distinct(rows)
    assert len(few) == 4
    np.testing.assert_array_equal(few[places].view(np.uint32), rows.view(np.uint32))
    assert [part.shape for part in distinct(rows[:0])] == [(0, 2), (0,)]


def test_work_in_a_thread_stays_close_behind_and_in_order() -> None:
    asked: list[int] = []
    done = behind(np.array, (asked.append(item) or item for item in range(9)))  # type: ignore[func-returns-value]
    for index, made in enumerate(done):
        assert made == index
        assert len(asked) <= index + BEHIND + 1
    with pytest.raises(ZeroDivisionError):
        list(behind(lambda item: np.array(1 // item), [1, 0, 1, 1, 1, 1]))
