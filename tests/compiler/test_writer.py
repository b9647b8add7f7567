"""What is written is a valid ONNX model, or an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from instantrt.compiler.backend.onnx_writer import check_graph, write_model
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import InMemory, Tile, View

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


class ThreeAtATime(InMemory):
    """Tiles of an odd number of rows."""

    def tiles(self) -> Iterator[Tile]:
        for start in range(0, len(self.array), 3):
            yield Tile(start, (self.array[start : start + 3],))


@pytest.mark.parametrize("shape", [(64,), (64, 5), (64, 4)])
def test_four_bit_values_are_packed_across_tiles(shape: tuple[int, ...], tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 16, shape).astype(ml_dtypes.uint4)
    weight = gs.Constant("w", View(ThreeAtATime(values), shape, values.dtype))
    y = gs.Variable("y", FLOAT32, list(shape))
    cast = gs.Node("Cast", "n", {"to": onnx.TensorProto.FLOAT}, [weight], [y])
    write_model(gs.Graph([cast], [], [y], opset=23, ir_version=10), tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], values.astype(np.float32))


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
