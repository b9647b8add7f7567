"""Whole operators against their decompositions: equal in float32, and finite in float16 where it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import InMemory, View
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.explicit_scales import ExplicitScales
from instantrt.passes.tensorrt.old_parser import unsupported
from tests.graphs import evaluate, relative

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
ROUNDINGS = 4 * 2.0**-11  # of float16, and so many of them one after another


def variable(name: str, dtype: Any, shape: list[Any]) -> gs.Variable:
    return gs.Variable(name, np.dtype(dtype), shape)


def graph_of(op: str, inputs: list[gs.Tensor], dtype: Any = FLOAT32, **attrs: Any) -> gs.Graph:
    y = variable("y", dtype, inputs[0].shape)
    fed = [t for t in inputs if isinstance(t, gs.Variable) and t.name]
    return gs.Graph([gs.Node(op, "node", attrs, inputs, [y])], fed, [y], opset=23, ir_version=10)


def equal_in_float32(graph: gs.Graph, feeds: dict[str, np.ndarray], folder: Path) -> None:
    """The decomposed graph is of opset 21, holds nothing that the parser refuses, and gives the same."""
    (want,) = evaluate(graph.copy(), feeds, folder)
    lowered = pipeline.decompose(graph.copy(), FLOAT32, PassLog())
    assert list(unsupported(graph))
    assert not list(unsupported(lowered))
    (got,) = evaluate(lowered, feeds, folder)
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def in_float16(graph: gs.Graph, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The decomposed graph, each node rounded to float16 where it is so typed."""
    lowered = pipeline.decompose(graph, FLOAT16, PassLog())
    return Evaluation(lowered, feeds, ["y"]).peek("y").astype(np.float32)


# --- RMSNormalization


def norm(dtype: Any = FLOAT32, **attrs: Any) -> gs.Graph:
    scale = np.random.default_rng(1).uniform(0.5, 2, 32).astype(dtype)
    return graph_of("RMSNormalization", [variable("x", dtype, ["b", "s", 32]), gs.Constant("w", scale)], dtype, **attrs)


@pytest.mark.parametrize("attrs", [{}, {"axis": -1, "epsilon": 1e-6}, {"axis": 2, "epsilon": 0.1}])
def test_a_norm(attrs: dict[str, Any], tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    equal_in_float32(norm(**attrs), {"x": x}, tmp_path)


def test_the_squares_of_a_norm_do_not_overflow() -> None:
    x = np.random.default_rng(0).standard_normal((1, 4, 32)).astype(np.float32)
    x[0, 1] *= 1000
    x = x.astype(np.float16)
    graph = norm(FLOAT16, epsilon=1e-6)
    scale = graph.nodes[0].inputs[1].values.astype(np.float32)
    wide = x.astype(np.float32)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale
    assert relative(in_float16(graph, {"x": x}), want) < ROUNDINGS


# --- RotaryEmbedding


def rotary(rotated: int, dtype: Any = FLOAT32, **attrs: Any) -> gs.Graph:
    angles = [variable(name, dtype, ["b", "s", rotated // 2]) for name in ("cos", "sin")]
    return graph_of("RotaryEmbedding", [variable("x", dtype, ["b", 2, "s", 16]), *angles], dtype, **attrs)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotated", [16, 8])
def test_a_rotary_embedding(rotated: int, interleaved: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, (3, 5, rotated // 2)).astype(np.float32)
    x = rng.standard_normal((3, 2, 5, 16)).astype(np.float32)
    attrs = {"rotary_embedding_dim": rotated} if rotated != 16 else {}
    feeds = {"x": x, "cos": np.cos(angle), "sin": np.sin(angle)}
    equal_in_float32(rotary(rotated, interleaved=interleaved, **attrs), feeds, tmp_path)


# --- Attention


def attention(
    heads: int, kv_heads: int, mask: gs.Tensor | None, dtype: Any = FLOAT32, width: int = 16, **attrs: Any
) -> gs.Graph:
    kv = [variable(n, dtype, ["b", kv_heads, "t", width]) for n in ("k", "v")]
    inputs = [variable("q", dtype, ["b", heads, "s", width]), *kv]
    return graph_of("Attention", [*inputs, mask] if mask is not None else inputs, dtype, **attrs)


def attention_feeds(heads: int, kv_heads: int, width: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"q": (2, heads, 3, width), "k": (2, kv_heads, 7, width), "v": (2, kv_heads, 7, width)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)], ids=["all", "groups", "one"])
@pytest.mark.parametrize("mask", [None, (3, 7), (2, 1, 3, 7), (2, "heads", 3, 7)], ids=str)
@pytest.mark.parametrize("boolean", [False, True], ids=["float", "bool"])
def test_attention(heads: int, kv_heads: int, mask: tuple[Any, ...] | None, boolean: bool, tmp_path: Path) -> None:
    feeds, tensor = attention_feeds(heads, kv_heads), None
    if mask is not None:
        shape = tuple(heads if size == "heads" else size for size in mask)
        seen = np.random.default_rng(1).random(shape) < 0.6
        seen[..., 0] = True
        feeds["mask"] = seen if boolean else np.where(seen, 0, -10000).astype(np.float32)
        tensor = variable("mask", feeds["mask"].dtype, list(shape))
    equal_in_float32(attention(heads, kv_heads, tensor, scale=0.3), feeds, tmp_path)


def test_attention_scales_by_the_width_of_a_head_unless_told(tmp_path: Path) -> None:
    equal_in_float32(attention(4, 2, None), attention_feeds(4, 2), tmp_path)


def test_no_head_of_the_cache_is_copied() -> None:
    lowered = pipeline.decompose(attention(8, 2, None), FLOAT32, PassLog())
    assert not {"Expand", "Tile", "Gather", "Concat"} & {n.op for n in lowered.nodes}


def test_products_of_float16_do_not_overflow() -> None:
    """Unscaled, the products are around 128 * 40 * 40: twice what float16 holds."""
    feeds = attention_feeds(4, 2, 128)
    feeds |= {name: (feeds[name] * 4 + 40).astype(np.float16) for name in ("q", "k")}
    feeds["v"] = feeds["v"].astype(np.float16)
    graph = attention(4, 2, None, FLOAT16, width=128)
    q, k, v = (feeds[name].astype(np.float64) for name in ("q", "k", "v"))
    scores = np.einsum("bhsd,bhtd->bhst", q, np.repeat(k, 2, 1)) / np.sqrt(128)
    assert scores.max() * np.sqrt(128) > 2 * 65504
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    # A score of 20000 is rounded to 16: it may swap two keys that are as near as that, never all.
    got = in_float16(graph, feeds)
    assert np.isfinite(got).all()
    nearest = np.abs(got[:, :, :, None] - np.repeat(v, 2, 1)[:, :, None]).max(-1).min(-1)
    assert np.median(nearest) < 0.01
    assert relative(got, np.einsum("bhst,bhtd->bhsd", weights, np.repeat(v, 2, 1))) < 0.5


def test_a_row_that_sees_nothing_averages() -> None:
    feeds = {name: value.astype(np.float16) for name, value in attention_feeds(4, 2).items()}
    feeds["mask"] = np.full((2, 1, 3, 7), -32752, np.float16)
    graph = attention(4, 2, variable("mask", FLOAT16, [2, 1, 3, 7]), FLOAT16)
    got = in_float16(graph, feeds)
    assert np.isfinite(got).all()


# --- weights in blocks


def blocks(bits: int, block: int, k: int = 256, n: int = 6) -> gs.Graph:
    rng = np.random.default_rng(0)
    low, dtype = (-128, np.dtype(np.int8)) if bits == 8 else (-8, np.dtype(ml_dtypes.int4))
    values = rng.integers(low, -low, (k, n)).astype(dtype)
    codes = gs.Constant("codes", View(InMemory(values), (k, n), dtype))
    scale = gs.Constant("scale", rng.uniform(0.01, 0.02, (k // block, n)).astype(np.float16))
    x, y, w = variable("x", FLOAT16, ["b", k]), variable("y", FLOAT16, ["b", n]), gs.Variable("w", FLOAT16, [k, n])
    nodes = [
        gs.Node("DequantizeLinear", "l/weight", {"axis": 0, "block_size": block}, [codes, scale], [w]),
        gs.Node("MatMul", "l", {}, [x, w], [y]),
    ]
    return gs.Graph(nodes, [x], [y], opset=23, ir_version=10)


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (8, 128), (8, 256), (4, 16), (4, 32), (4, 256), (4, 64)])
def test_blocks_that_tensorrt_does_not_list_are_multiplied_apart(bits: int, block: int, tmp_path: Path) -> None:
    """Not one value of the matrix changes."""
    graph = blocks(bits, block)
    graph.outputs = [graph.nodes[0].outputs[0]]
    lowered = run(graph.copy(), [ExplicitScales()], PassLog())
    (dequantize,) = (n for n in lowered.nodes if n.op == "DequantizeLinear")
    assert dequantize.name == "l/weight"
    assert dequantize.attrs.get("block_size", 0) in ((64, 128) if bits == 4 else (0,))
    assert any(n.op == "Mul" for n in lowered.nodes) == ((bits, block) != (4, 64))
    feeds = {"x": np.ones((1, 256), np.float16)}
    (want,), (got,) = (evaluate(each, feeds, tmp_path) for each in (graph, lowered))
    assert len(np.unique(want)) > 20
    np.testing.assert_array_equal(got, want)


# --- what is refused


def test_every_node_that_the_parser_lacks_is_named_at_once() -> None:
    x = variable("x", FLOAT32, ["b", 2, "s", 16])
    outputs = [gs.Variable(f"y{i}", np.dtype(np.float32), ["b", 2, "s", 16]) for i in range(6)]
    axes, wide = variable("axes", np.int64, [1]), variable("wide", np.float64, ["b", 2, "s", 16])
    chosen = variable("chosen", np.bool_, ["b", 2, "s", 16])
    nodes = [
        gs.Node("Swish", "first", {}, [x], [outputs[0]]),
        gs.Node("Attention", "second", {"is_causal": 1}, [x, x, x], [outputs[1]]),
        gs.Node("ReduceMean", "third", {}, [x, axes], [outputs[2]]),
        gs.Node("Sqrt", "fourth", {}, [wide], [outputs[3]]),
        gs.Node("Where", "fifth", {}, [chosen, wide, wide], [outputs[4]]),
        gs.Node("Relu", "fine", {}, [x], [outputs[5]]),
    ]
    graph = gs.Graph(nodes, [x, axes, wide, chosen], outputs, opset=24)
    with pytest.raises(UserError) as caught:
        pipeline.decompose(graph, FLOAT32, PassLog())
    assert caught.value.found.splitlines() == [
        "first (Swish): its parser has no such operator",
        "second (Attention): attention with is_causal or softcap, where a mask and Tanh are expected",
        "third (ReduceMean): its parser wants a constant as input 1",
        "fourth (Sqrt): its parser takes float16, float32 here, not float64",
        "fifth (Where): its parser takes bool, float16, float32, int32, int64 here, not float64",
    ]


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (norm(axis=1), "more than the last axis"),
        (attention(4, 2, None, softcap=30.0), "softcap"),
        (blocks(4, 32, k=96), "in blocks of 64 or 128"),
        (blocks(4, 64, n=5), "even number of outputs"),
    ],
    ids=["axis", "softcap", "K", "N"],
)
def test_what_has_no_decomposition_says_why(graph: gs.Graph, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        pipeline.decompose(graph, FLOAT32, PassLog())


def test_operators_inside_a_branch_are_seen() -> None:
    inner = gs.Graph(
        [gs.Node("Swish", "inner", {}, [gs.Variable("x", FLOAT32, [2])], [gs.Variable("o", FLOAT32, [2])])]
    )
    inner.outputs = [inner.nodes[0].outputs[0]]
    condition, y = variable("c", np.bool_, []), variable("y", FLOAT32, [2])
    branch = gs.Node("If", "outer", {"then_branch": inner, "else_branch": inner.copy()}, [condition], [y])
    graph = gs.Graph([branch], [condition, variable("x", FLOAT32, [2])], [y], opset=24)
    assert {node.name for node, _ in unsupported(graph)} == {"inner"}
