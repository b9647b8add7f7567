"""Scales in 16 bits: widened once, folded by ONNX Runtime, and the values that they were."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from instantrt.compiler.backend.onnx_writer import layout
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import InMemory, View
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.ort.in_half import KeepScalesInHalf
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.ort.tables import QuantizeTables
from instantrt.passes.qdq.insert_qdq import InsertDequantize
from tests.graphs import evaluate, linear_graph, relative

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
V, H, GROUP = 512, 128, 32
IDS = np.array([[3, 95, 0, 17]])


def tied(bits: int) -> gs.Graph:
    """A head [V, H] that reads rows of the table it is tied to; of 8 bits, both have one quantization."""
    w = InMemory((np.random.default_rng(0).standard_normal((V, H)) * 0.02).astype(np.float32))
    graph = linear_graph({"head": w.array})
    ids = gs.Variable("ids", np.int64, ["b", "s"])
    table = gs.Constant("embedding.weight", View(w, (V, H), np.float32))
    graph.nodes[0].inputs[0] = add(graph, "Gather", [table, ids], gs.Variable("x", np.float32, ["b", "s", H]), axis=0)
    graph.inputs = [ids]
    quant = QuantTensor(
        "head", InstantQuant("head", w, bits, GROUP, False, BFLOAT16), (V, H), bits, GROUP, False, BFLOAT16
    )
    run(graph.toposort(), [InsertDequantize({"head": quant}), QuantizeTables(), *linear_passes("fast")], PassLog())
    return graph


@pytest.mark.parametrize("bits", [8, 4])
def test_scales_are_half_as_large_and_nothing_else_changes(tmp_path: Path, bits: int) -> None:
    wide = tied(bits)
    half = run(wide.copy(), [KeepScalesInHalf()], PassLog())
    casts = [node for node in half.nodes if node.op == "Cast"]
    assert len(casts) == (1 if bits == 8 else 2)  # a tied table's are widened once
    assert {node.inputs[0].name for node in casts} <= {"head.scales", "embedding.weight.scales"}
    sizes = [sum({p.offset: p.view.nbytes for p in layout(graph)[0]}.values()) for graph in (wide, half)]
    groups = V * (H // GROUP + (bits == 4))  # at four bits the table has its own, rows of one group
    assert sizes[0] - sizes[1] == 2 * groups
    (want,), (got,) = (evaluate(graph.copy(), {"ids": IDS}, tmp_path) for graph in (wide, half))
    np.testing.assert_array_equal(got, want)
    # Node by node, too: a kernel that packs its scales has them as constants.
    assert relative(Evaluation(half, {"ids": IDS}).take("y.head"), want) < 1e-6


def test_no_cast_is_left_to_run(tmp_path: Path) -> None:
    evaluate(run(tied(8), [KeepScalesInHalf()], PassLog()), {"ids": IDS}, tmp_path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    ops = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "Cast" not in ops
    assert "MatMulNBits" in ops


def test_scales_of_more_bits_stay() -> None:
    """Those that a checkpoint has in float32."""
    w = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    float32 = np.dtype(np.float32)
    quant = QuantTensor("q", InstantQuant("q", InMemory(w), 8, 32, False, float32), (16, 64), 8, 32, False, float32)
    passes = [InsertDequantize({"q": quant}), *linear_passes("fast"), KeepScalesInHalf()]
    assert "Cast" not in {node.op for node in run(linear_graph({"q": w}), passes, PassLog()).nodes}
