"""What stays float32, what becomes 16 bits, and what an interface keeps."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import InMemory, View, view_of
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type

FLOAT16, FLOAT32, INT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.int64)


def variable(name: str, dtype: np.dtype = FLOAT32, shape: tuple = ("b", 4)) -> gs.Variable:
    return gs.Variable(name, dtype, list(shape))


def graph(nodes: list[gs.Node], inputs: list[gs.Variable], outputs: list[gs.Variable]) -> gs.Graph:
    return gs.Graph(nodes, inputs, outputs, opset=23, ir_version=10)


def test_what_derives_from_integers_stays_float32_until_it_meets_hidden_states() -> None:
    """positions -> angle -> cosine in float32, cast, then times the embedding."""
    ids, positions = variable("ids", INT64, ("b",)), variable("positions", INT64, ("b", 4))
    hidden, angle, cosine, y = variable("hidden"), variable("angle"), variable("cosine"), variable("y")
    embedding = gs.Constant("embedding", View(InMemory(np.ones((8, 4), np.float32)), (8, 4), FLOAT32))
    nodes = [
        gs.Node("Gather", "embed", {}, [embedding, ids], [hidden]),
        gs.Node("Cast", "angle", {"to": 1}, [positions], [angle]),
        gs.Node("Cos", "cosine", {}, [angle], [cosine]),
        gs.Node("Mul", "rotate", {}, [hidden, cosine], [y]),
    ]
    cast = run(graph(nodes, [ids, positions], [y]), cast_compute_type(FLOAT16), PassLog())
    by_name = {node.name: node for node in cast.nodes}
    assert by_name["embed"].inputs[0].dtype == FLOAT16
    assert by_name["cosine"].outputs[0].dtype == FLOAT32
    assert by_name["rotate"].inputs[1].dtype == by_name["rotate"].outputs[0].dtype == FLOAT16
    assert cast.outputs[0].dtype == FLOAT32


def test_sizes_and_comparisons_keep_their_type() -> None:
    """Where a pass before left it open: a size stays an integer that others are joined to."""
    ids, hidden, size, greater = (
        variable("ids", INT64, ("b",)),
        variable("hidden"),
        gs.Variable("size"),
        gs.Variable("more"),
    )
    embedding = gs.Constant("embedding", View(InMemory(np.ones((8, 4), np.float32)), (8, 4), FLOAT32))
    nodes = [
        gs.Node("Gather", "embed", {}, [embedding, ids], [hidden]),
        gs.Node("Shape", "size", {}, [hidden], [size]),
        gs.Node("Greater", "more", {}, [hidden, gs.Constant("one", np.array(1, np.float32))], [greater]),
    ]
    cast = run(graph(nodes, [ids], [hidden]), cast_compute_type(FLOAT16), PassLog())
    assert size.dtype is greater.dtype is None
    assert cast.nodes[-1].op == "Cast"


def test_squares_of_large_values_do_not_overflow() -> None:
    """The mean square of 1000 is 1e6, beyond float16; its root is not."""
    past, square, mean, root, present = (variable(n) for n in ("past_key_values.x", "s", "m", "r", "present.x"))
    nodes = [
        gs.Node("Pow", "square", {}, [past, gs.Constant("two", np.array(2, np.float32))], [square]),
        gs.Node("ReduceMean", "mean", {"keepdims": 1}, [square, gs.Constant("axes", np.array([-1]))], [mean]),
        gs.Node("Sqrt", "root", {}, [mean], [root]),
        gs.Node("Div", "norm", {}, [past, root], [present]),
    ]
    cast = run(graph(nodes, [past], [present]), cast_compute_type(FLOAT16), PassLog())
    got = Evaluation(cast, {"past_key_values.x": np.full((1, 4), 1000, np.float16)}).take("present.x")
    assert got.dtype == FLOAT16
    np.testing.assert_allclose(got.astype(np.float32), 1, rtol=1e-3)


def test_a_row_that_sees_nothing_is_finite() -> None:
    """Two masks of the lowest float32, added, then a softmax: float16 would make it NaN."""
    seen, scores = variable("seen", np.dtype(bool)), variable("past_key_values.scores")
    mask, twice, masked, y = variable("mask"), variable("twice"), variable("masked"), variable("present.y")
    lowest = gs.Constant("lowest", np.array(np.finfo(np.float32).min, np.float32))
    nodes = [
        gs.Node("Where", "mask", {}, [seen, gs.Constant("zero", np.array(0, np.float32)), lowest], [mask]),
        gs.Node("Add", "twice", {}, [mask, mask], [twice]),
        gs.Node("Add", "masked", {}, [scores, twice], [masked]),
        gs.Node("Softmax", "softmax", {"axis": -1}, [masked], [y]),
    ]
    cast = run(graph(nodes, [seen, scores], [y]), cast_compute_type(FLOAT16), PassLog())
    feeds = {
        "seen": np.array([[False] * 4, [True, True, False, False]]),
        "past_key_values.scores": np.ones((2, 4), np.float16),
    }
    got = Evaluation(cast, feeds).take("present.y").astype(np.float32)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[1], [0.5, 0.5, 0, 0])


def test_caches_change_type_and_other_inputs_do_not() -> None:
    """One output is read by a node that computes in float32, and each is made by a node of its own name."""
    x, past, y, root, present = (variable(n) for n in ("x", "past_key_values.0.key", "logits", "r", "present.0.key"))
    nodes = [
        gs.Node("Neg", "logits", {}, [x], [y]),
        gs.Node("Sqrt", "root", {}, [y], [root]),
        gs.Node("Mul", "present.0.key", {}, [past, root], [present]),
    ]
    cast = run(graph(nodes, [x, past], [y, present]), cast_compute_type(np.dtype(ml_dtypes.bfloat16)), PassLog())
    assert [t.dtype.name for t in (*cast.inputs, *cast.outputs)] == ["float32", "bfloat16", "float32", "bfloat16"]
    assert [node.op for node in cast.nodes].count("Cast") == 4  # x, the root's input and output, logits
    assert len({node.name for node in cast.nodes}) == len(cast.nodes)


@pytest.mark.parametrize("value", [7e4, -7e4])
def test_a_weight_beyond_float16_is_an_error_with_its_name(value: float) -> None:
    past, present = variable("past_key_values.x"), variable("present.x")
    weight = gs.Constant("model.w", View(InMemory(np.full((4, 4), value, np.float32)), (4, 4), FLOAT32))
    cast = run(
        graph([gs.Node("MatMul", "m", {}, [past, weight], [present])], [past], [present]),
        cast_compute_type(FLOAT16),
        PassLog(),
    )
    with pytest.raises(UserError, match=r"model\.w: a weight does not fit float16"):
        view_of(cast.nodes[0].inputs[1]).load()


def test_operators_without_16_bits_keep_float32() -> None:
    boxes, scores, y = variable("boxes", shape=(1, 8, 4)), variable("scores", shape=(1, 1, 8)), variable("y", INT64)
    node = gs.Node("NonMaxSuppression", "nms", {}, [boxes, scores], [y])
    cast = run(graph([node], [boxes, scores], [y]), cast_compute_type(FLOAT16), PassLog())
    (kept,) = (each for each in cast.nodes if each.op == "NonMaxSuppression")
    assert [tensor.dtype for tensor in kept.inputs] == [FLOAT32, FLOAT32]
