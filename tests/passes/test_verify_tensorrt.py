"""Graphs that TensorRT builds without a word and computes wrongly, or refuses in words that help nobody."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.verify import Stage, verify

K, N = 8, 4


def int8_product(scale: np.ndarray, **attrs: int) -> gs.Graph:
    """Quantized x times a weight with `scale`."""
    x, y = gs.Variable("x", np.float16, ["b", K]), gs.Variable("y", np.float16, ["b", N])
    step = gs.Constant("step", np.array(0.5, np.float16))
    xq, xd, w = (gs.Variable(n, t) for n, t in (("xq", np.int8), ("xd", np.float16), ("w", np.float16)))
    codes = gs.Constant("codes", np.ones((K, N), np.int8))
    nodes = [
        gs.Node("QuantizeLinear", "q", {}, [x, step], [xq]),
        gs.Node("DequantizeLinear", "dq", {}, [xq, step], [xd]),
        gs.Node("DequantizeLinear", "weight", attrs, [codes, gs.Constant("scale", scale.astype(np.float16))], [w]),
        gs.Node("MatMul", "product", {}, [xd, w], [y]),
    ]
    return gs.Graph(nodes, [x], [y], opset=23)


def test_one_weight_scale_is_what_an_int8_product_takes() -> None:
    verify(int8_product(np.array(1.0)), Stage.TENSORRT)


@pytest.mark.parametrize(
    ("scale", "attrs"),
    [(np.ones((2, N)), {"axis": 0, "block_size": 4}), (np.ones(N), {"axis": 1})],
    ids=["block", "channel"],
)
def test_several_weight_scales_in_an_int8_product_are_refused(scale: np.ndarray, attrs: dict[str, int]) -> None:
    with pytest.raises(AssertionError, match="weight with several scales"):
        verify(int8_product(scale, **attrs), Stage.TENSORRT)


def attention(inputs: int, outputs: int = 1, **attrs: int) -> gs.Graph:
    tensors = [gs.Variable(f"i{i}", np.float16, ["b", 2, "s", 8]) for i in range(inputs)]
    results = [gs.Variable(f"o{i}", np.float16, ["b", 2, "s", 8]) for i in range(outputs)]
    return gs.Graph([gs.Node("Attention", "attention", attrs, tensors, results)], tensors, results, opset=23)


def test_attention_with_an_explicit_mask_is_fine() -> None:
    verify(attention(4), Stage.TENSORRT)


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (attention(4, is_causal=1), "the mask is not explicit"),
        (attention(3), "the mask is not explicit"),
        (attention(6, 3), "a cache or lengths inside the node"),
        (attention(5), "a cache or lengths inside the node"),
    ],
    ids=["causal", "no mask", "cache", "lengths"],
)
def test_attention_that_tensorrt_misreads_is_refused(graph: gs.Graph, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        verify(graph, Stage.TENSORRT)


@pytest.mark.parametrize("zero", [np.array(3, np.int8), np.array([0, 0, 1, 0], np.int8)])
def test_zero_points_are_refused(zero: np.ndarray) -> None:
    graph = int8_product(np.array(1.0))
    graph.nodes[2].inputs.append(gs.Constant("zero", zero))
    with pytest.raises(AssertionError, match="a zero point"):
        verify(graph, Stage.TENSORRT)


def test_unsigned_codes_are_refused() -> None:
    graph = int8_product(np.array(1.0))
    graph.nodes[2].inputs[0] = gs.Constant("codes", np.ones((K, N), np.uint8))
    with pytest.raises(AssertionError, match="unsigned codes"):
        verify(graph, Stage.TENSORRT)


def test_scales_that_are_computed_are_refused() -> None:
    graph = int8_product(np.array(1.0))
    graph.nodes[1].inputs[1] = gs.Variable("step", np.float16, [])
    with pytest.raises(AssertionError, match=r"node dq .*a scale computed at run time"):
        verify(graph, Stage.TENSORRT)
