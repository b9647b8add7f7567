"""Loud channels of a norm, folded into the linears behind it: the same model, and int8 tokens that keep the others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.importance import input_energy
from instantrt.compiler.quant.config import QuantConfig
from instantrt.compiler.quant.instant import decide
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import FLOAT32, Array, InMemory
from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.float.scaled import ScaledColumns

N, K = 24, 64
NORMED = """normed (float[1,s,64] x, float[64] scale, float[64] bias, float[64,24] w) => (float[1,s,24] y) {
    n = LayerNormalization (x, scale, bias)
    y = MatMul (n, w)
}"""


def normed_linear(scale: Array, w: Array) -> gs.Graph:
    """MatMul(LayerNormalization(x), w), the linear called `up`."""
    graph = gs.import_onnx(
        onnx.helper.make_model(onnx.parser.parse_graph(NORMED), opset_imports=[onnx.helper.make_opsetid("", 23)])
    )
    norm, product = graph.nodes
    norm.inputs[1], norm.inputs[2] = gs.Constant("scale", scale), gs.Constant("bias", scale * np.float32(0.1))
    product.inputs[1] = weight_constant("up", InMemory(w), w.shape)
    product.name, graph.inputs = "up", graph.inputs[:1]
    return graph


def test_loud_channels_cost_int8_tokens_nothing() -> None:
    random = np.random.default_rng(0)
    w = random.standard_normal((N, K)).astype(np.float32)
    scale = random.uniform(0.5, 1.5, K).astype(np.float32)
    loud = np.ones(K, np.float32)
    loud[[3, 40]] = 32
    x = {"x": random.standard_normal((1, 50, K)).astype(np.float32)}

    def errors(graph: gs.Graph) -> tuple[float, float]:
        """Of the folded float graph, and of its twin, against the graph as it is."""
        exact = Evaluation(graph, x).take("y")
        decisions = decide(pipeline.linears(graph), QuantConfig(compute_method="activate_quant"), FLOAT32)
        floating, decisions = pipeline.fold_norms(graph, decisions, PassLog())
        twin = pipeline.quantize(floating.copy(), decisions, PassLog())
        folded, got = Evaluation(floating, x).take("y"), Evaluation(twin, x).take("y")
        return float(np.abs(folded - exact).max()), float(np.linalg.norm(got - exact) / np.linalg.norm(exact))

    usual, (off, error) = errors(normed_linear(scale, w))[1], errors(normed_linear(scale * loud, w / loud))
    assert off == 0  # the factors are powers of two
    assert error < 1.1 * usual


def test_inputs_that_are_not_finite_are_no_scales_to_search() -> None:
    """Not said of the weight, which is right."""
    x = {"x": np.full((1, 2, K), np.nan, np.float32)}
    graph = normed_linear(np.ones(K, np.float32), np.ones((N, K), np.float32))
    with pytest.raises(UserError, match=r"^up: what reaches this layer is not finite"):
        input_energy(graph, None, Data("generated", feeds=(x,)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("changed", "factor"), [(4, 8), (4, 0.125), (40, 8), (4, 3), (4, 1024)])
def test_scaled_columns_are_the_products_in_whatever_type(dtype: type, changed: int, factor: float) -> None:
    rows = (np.random.default_rng(1).standard_normal((N, K), np.float32) * 100).astype(dtype)
    rows[0, :3] = np.inf, np.nan, float(ml_dtypes.finfo(dtype).smallest_subnormal)
    factors = np.ones(K, FLOAT32)
    factors[:changed] = factor
    (tile,) = ScaledColumns(InMemory(rows), factors.tobytes()).tiles()
    np.testing.assert_array_equal(tile.parts[0].astype(FLOAT32), rows.astype(FLOAT32) * factors)
    narrow = changed == 4 and factor == 8 and dtype == ml_dtypes.bfloat16
    rows[0, 1] = 0  # NaN is not equal to itself
    (tile,) = ScaledColumns(InMemory(rows), factors.tobytes()).tiles()
    assert not narrow or tile.parts[0].dtype == dtype
