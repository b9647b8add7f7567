"""Embedding tables of 8 bits in plain operators: the row of every id, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.evaluate_node import dependencies
from instantrt.passes.core.lazy import Array, InMemory, Tile, View
from instantrt.passes.core.quant import InstantQuant, QuantTensor, dequantize, quantize_asymmetric
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.ort.tables import QuantizeTables
from instantrt.passes.qdq.tables import Table, picks_tokens
from instantrt.passes.tensorrt.lower_native_tables import LowerNativeTables
from tests.graphs import evaluate

V, H, BLOCK = 40, 96, 32
FLOAT16 = np.dtype(np.float16)
IDS = np.array([[3, 39, 0], [17, 3, 20]])


def reader(table: np.ndarray, readers: int = 1) -> gs.Graph:
    """Gather(table, ids), several times where a model reads a table twice."""
    ids = gs.Variable("ids", np.int64, ["b", "s"])
    graph = gs.Graph(inputs=[ids], opset=23, ir_version=10)
    constant = gs.Constant("embedding.weight", View(InMemory(table), table.shape, np.float32))
    for i in range(readers):
        out = gs.Variable(f"y{i}", np.float32, ["b", "s", table.shape[1]])
        graph.outputs.append(add(graph, "Gather", [constant, ids], out, axis=0))
    return graph


@dataclass(frozen=True, eq=False)
class Tiled:
    """A matrix by few rows at a time."""

    array: Array

    def tiles(self) -> Iterator[Tile]:
        yield from (Tile(start, (self.array[start : start + 7],)) for start in range(0, len(self.array), 7))


@pytest.fixture
def table() -> np.ndarray:
    """Rows of different sizes, none of which has its zero in the middle."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((V, H)) * rng.uniform(0.1, 10, (V, 1)) + 0.3).astype(np.float32)


def test_rows_are_the_dequantized_ones_exactly(table: np.ndarray, tmp_path: Path) -> None:
    block = quantize_asymmetric(table.reshape(V, -1, BLOCK).copy(), 8, FLOAT16)
    assert len(np.unique(block.zero)) > 10
    want = dequantize(block, BLOCK)[IDS]
    graph = run(reader(table, 2), [LowerNativeTables(FLOAT16)], PassLog())
    for got in evaluate(graph.copy(), {"ids": IDS}, tmp_path):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(Evaluation(graph, {"ids": IDS}).take("y0"), want)


@pytest.mark.parametrize("bits", [4, 8])
def test_of_a_table_in_codes_only_rows_that_are_picked_are_held(
    bits: int, table: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scales and zero points of one reading, in tiles; -1 is the last row, and there is none behind it."""
    source = InstantQuant("t", Tiled(table), bits, BLOCK, False, FLOAT16)
    stored = QuantTensor("t", source, (V, H), bits, BLOCK, False, FLOAT16)
    graph = reader(table)
    QuantizeTables().rewrite(graph, Table(graph.nodes[0], stored))
    graph.cleanup()
    ids = np.where(IDS == 39, -1, IDS)
    want = evaluate(graph.copy(), {"ids": IDS}, tmp_path)[0]
    monkeypatch.setattr(View, "load", lambda self: pytest.fail(f"{self.shape} is loaded"))
    np.testing.assert_array_equal(Evaluation(graph, {"ids": ids}).take("y0"), want)
    with pytest.raises(IndexError, match=f"of {V}"):
        Evaluation(graph, {"ids": IDS + 1}).take("y0")


def test_the_table_streams_when_the_graph_is_evaluated(table: np.ndarray) -> None:
    graph = run(reader(table), [LowerNativeTables(FLOAT16)], PassLog())
    gathers = [node for node in graph.nodes if node.op == "Gather"]
    assert len(gathers) == 3
    assert {t.name for node in gathers for t in dependencies(node)} == {"ids"}


@pytest.mark.parametrize(("nodes", "picks"), [
    ("i = Squeeze(ids)", True),
    ("c = Cast<to=7>(ids) i = Unsqueeze(c, one)", True),
    ("m = Equal(ids, one) i = Where(m, zero, ids)", True),
    ("i = Squeeze(position_ids)", False),
    ("n = Not(m) c = Cast<to=7>(n) i = CumSum(c, one)", False),
    ("i = Squeeze(one)", False),
])  # fmt: skip
def test_the_table_is_the_one_that_tokens_pick_from(nodes: str, picks: bool) -> None:
    inputs = "int64[b,s] ids, int64[b,s] position_ids, bool[b,s] m0"
    body = nodes.replace("Not(m)", "Not(m0)")
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> g ({inputs}) => (int64[b,s] i)'
        f" <int64[1] one = {{1}}, int64[1] zero = {{0}}> {{ {body} }}"
    )
    assert picks_tokens(gs.import_onnx(model).outputs[0]) is picks


def test_a_table_without_blocks_stays_and_says_why(table: np.ndarray) -> None:
    log = PassLog()
    graph = run(reader(table[:, :40]), [LowerNativeTables(FLOAT16)], log)
    assert [node.op for node in graph.nodes] == ["Gather"]
    assert [entry.reason for entry in log.rejected()] == ["width 40 is no multiple of 16"]
