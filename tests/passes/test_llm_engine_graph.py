"""Logits of the last token, and the cache in place: each against the graph it came from, on the example model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.frontend.model import FloatModel
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.qdq.last_logits import LastLogits
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from tests.graphs import FLOAT32, evaluate, relative

B, S, P, M = 2, 3, 5, 16


@pytest.fixture(scope="module")
def feeds(tiny_float: FloatModel) -> dict[str, np.ndarray]:
    """Two sequences, the second padded on the left; a past of 5 and 3 new tokens."""
    rng = np.random.default_rng(0)
    mask = np.ones((B, P + S), np.int64)
    mask[1, :2] = 0
    values: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, 4000, (B, S)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(P, P + S), (B, 1)),
    }
    for tensor in tiny_float.graph.inputs[3:]:
        heads, width = tensor.shape[1], tensor.shape[3]
        values[tensor.name] = rng.standard_normal((B, heads, P, width)).astype(np.float32)
    return values


@pytest.fixture(scope="module")
def want(tiny_float: FloatModel, feeds: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list:
    return evaluate(tiny_float.graph.copy(), feeds, tmp_path_factory.mktemp("float"))


def test_last_logits_are_the_last_row_of_all(tiny_float: FloatModel, feeds: dict, want: list, tmp_path: Path) -> None:
    graph = run(tiny_float.graph.copy(), [LastLogits()], PassLog())
    assert graph.outputs[0].shape[1] == 1
    got = evaluate(graph, feeds, tmp_path)
    np.testing.assert_allclose(got[0], want[0][:, -1:], rtol=1e-4, atol=1e-4)
    for present, expected in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(present, expected)


def test_the_last_token_alone_is_quantized_for_the_head(
    tiny_float: FloatModel, feeds: dict, want: list, tmp_path: Path
) -> None:
    """The same codes and scales, from a Slice before them: TensorRT-RTX crashes over one behind them."""
    (head,) = (layer for layer in pipeline.linears(tiny_float.graph) if layer.path == "lm_head")
    k = head.shape[1]
    source = InstantQuant("lm_head", head.rows, 8, k, True, FLOAT32)
    decisions = {"lm_head": QuantTensor("lm_head", source, head.shape, 8, k, True, FLOAT32, "int8")}
    twin = pipeline.quantize(tiny_float.graph.copy(), decisions, PassLog())
    last = run(twin.copy(), [LastLogits(), QuantizeActivations()], PassLog())
    (quantize,) = (node for node in last.nodes if node.op == "QuantizeLinear")
    assert quantize.inputs[0].inputs[0].op == "Slice"
    all_tokens = evaluate(twin, feeds, tmp_path)[0]
    assert relative(all_tokens, want[0]) > 1e-3, "quantization shows"
    np.testing.assert_allclose(evaluate(last, feeds, tmp_path)[0], all_tokens[:, -1:], rtol=1e-5, atol=1e-5)


def test_a_cache_in_place_gives_the_same_logits_and_entries(
    tiny_float: FloatModel, feeds: dict, want: list, tmp_path: Path
) -> None:
    graph = tiny_float.graph.copy()
    graph.import_domains = [onnx.helper.make_opsetid("", graph.opset), onnx.helper.make_opsetid("own", 1)]
    run(graph, kv_in_place(M), PassLog())
    assert {each.domain: each.version for each in graph.import_domains} == {"": graph.opset, "own": 1}
    rng = np.random.default_rng(1)

    def allocated(past: np.ndarray) -> np.ndarray:
        """The past in the first P places of a buffer full of old values, which nothing may read."""
        full = rng.standard_normal((B, past.shape[1], M, past.shape[3])).astype(np.float32)
        full[:, :, :P] = past
        return full

    fixed = {name: allocated(v) if name.startswith("past") else v for name, v in feeds.items()}
    got = evaluate(graph, fixed, tmp_path)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3, atol=1e-3)
    for present, expected in zip(got[1:], want[1:], strict=True):
        assert present.shape[2] == M
        np.testing.assert_allclose(present[:, :, : P + S], expected, rtol=1e-3, atol=1e-3)


def test_a_cache_that_something_else_reads_is_refused_by_name(tiny_float: FloatModel) -> None:
    graph = tiny_float.graph.copy()
    present = next(t for t in graph.outputs if t.name == "present.2.key")
    extra = gs.Variable("extra", np.float32, present.shape)
    graph.nodes.append(gs.Node("Neg", "spy", {}, [present], [extra]))
    graph.outputs.append(extra)
    with pytest.raises(UserError, match=r"past_key_values\.2\.key: this cache cannot be updated in place"):
        run(graph, kv_in_place(M), PassLog())
