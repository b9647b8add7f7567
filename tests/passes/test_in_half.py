"""What stays float and is stored in 16 bits stays so, whoever else reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler.backend.onnx_writer import layout
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import FileTensor, View
from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.ort.in_half import KeepFloatLinearsInHalf, KeepTablesInHalf

V, H = 40, 24
FEEDS = {"ids": np.array([[3, 39, 0]]), "others": np.array([[7, 3, 3]])}


@pytest.mark.parametrize("other", ["table", "products"])
def test_what_two_read(other: str, tmp_path: Path) -> None:
    """A table of two Gathers, and of what reads it whole; a matrix of two products."""
    values = np.random.default_rng(0).standard_normal((V, H)).astype(np.float16)
    (tmp_path / "weights").write_bytes(values.tobytes())
    stored = FileTensor(tmp_path / "weights", 0, (V, H), np.dtype(np.float16), "w")
    ids, others = (gs.Variable(name, np.int64, ["b", "s"]) for name in FEEDS)
    graph = gs.Graph([], [ids, others], opset=23)
    table, matrix = gs.Constant("table", View(stored, (V, H), np.float32)), weight_constant("head", stored, (V, H))
    x, y = (
        add(graph, "Gather", [table, each], gs.Variable(f"of {each.name}", np.float32, ["b", "s", H]), axis=0)
        for each in (ids, others)
    )
    read = [("ReduceSum", [table])] if other == "table" else [("MatMul", [x, matrix]), ("MatMul", [y, matrix])]
    outputs = [add(graph, op, inputs, gs.Variable(f"y{i}", np.float32)) for i, (op, inputs) in enumerate(read)]
    graph.outputs = [add(graph, "Add", [x, y], gs.Variable("sum", np.float32)), *outputs]
    half = run(graph.copy(), [KeepTablesInHalf(), KeepFloatLinearsInHalf()], PassLog())
    for output in graph.outputs:
        want, got = (Evaluation(each, FEEDS).take(output.name) for each in (graph, half))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    dtypes = {p.name: p.view.dtype for p in layout(half)[0]}
    assert dtypes == {"table_half": np.float16} | ({"table": np.float32} if other == "table" else {})
