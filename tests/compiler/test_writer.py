"""What is written is a valid ONNX model, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from instantrt.compiler.backend.onnx_writer import check_graph, write_model
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import InMemory, View

FLOAT32 = np.dtype(np.float32)


def graph(op: str, weight: gs.Constant, opset: int = 23) -> gs.Graph:
    """x [b, 64] -> `op` with `weight` -> y [b, 64]."""
    x, y = (gs.Variable(name, FLOAT32, ["b", 64]) for name in "xy")
    return gs.Graph([gs.Node(op, "n", {}, [x, weight], [y])], [x], [y], opset=opset, ir_version=10)


def large(shape: tuple[int, ...], dtype: type = np.float32) -> gs.Constant:
    """A weight of zeros that goes to the external data."""
    return gs.Constant("w", View(InMemory(np.zeros(shape, dtype)), shape, dtype))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (graph("MatMul", large((64, 64), np.float16)), "inconsistent type"),
        (graph("MatMul", large((32, 64))), "Incompatible dimensions"),
        (graph("RMSNormalization", gs.Constant("w", np.ones(64, np.float32)), opset=21), "No Op registered"),
    ],
)
def test_what_no_runtime_loads_is_refused(broken: gs.Graph, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"not a valid ONNX model[^$]*{says}"):
        write_model(broken, tmp_path / "model.onnx")
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


def test_the_check_reads_no_weights(tmp_path: Path) -> None:
    """64 GB of them, of which no byte is stored."""
    n = 1 << 28
    weight = View(InMemory(np.zeros(0, np.float32)), (64, n), np.float32)
    huge = graph("MatMul", gs.Constant("w", weight))
    huge.outputs[0].shape = ["b", n]
    model = gs.export_onnx(huge)
    fields = {"location": "model.onnx.data", "offset": "0", "length": str(weight.nbytes)}
    for key, value in fields.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "model.onnx.data").open("wb") as file:
        file.truncate(weight.nbytes)
    check_graph(tmp_path / "model.onnx")
