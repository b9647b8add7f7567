"""Lazy constants and the writer: tiles, transposition, packing; bytes on disk equal the tensors they stand for."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper

from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.backend import onnx_writer as writer
from instantrt.passes.core import lazy
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor, InMemory, Transposed, View


def stored(path: Path, values: np.ndarray) -> FileTensor:
    path.write_bytes(b"head" + values.tobytes())
    return FileTensor(path, 4, values.shape, values.dtype, "t")


@pytest.mark.parametrize("shape", [(7,), (1, 5), (300, 70), (5, 3, 4)])
def test_tiles_deliver_the_file(tmp_path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "TILE_BYTES", 1000)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    tensor = stored(tmp_path / "t", values)
    assert (View(tensor, shape, np.float32).load() == values).all()


def test_a_stored_matrix_is_read_by_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "TILE_BYTES", 1000)
    values = np.random.default_rng(0).standard_normal((50, 5000)).astype(np.float16)
    tiles = list(Transposed(stored(tmp_path / "t", values)).tiles())
    assert len(tiles) > 1
    assert (np.concatenate([t.parts[0] for t in tiles]) == values.T).all()


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "t", np.zeros((10, 10), np.float32))
    os.truncate(tmp_path / "t", 100)
    with pytest.raises(UserError, match="ends inside tensor t"):
        list(tensor.tiles())


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int8, ml_dtypes.uint4, ml_dtypes.int4]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(64, 96), (37, 50), (33, 51), (2000, 6)])
def test_written_bytes_are_the_tensor(
    tmp_path: Path, dtype: type, axis: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through onnx's own reader: rows and columns, every type, widths that do not fit a strip or a byte."""
    monkeypatch.setattr(lazy, "TILE_BYTES", 1 << 10)
    monkeypatch.setattr(writer, "STRIP_BYTES", 20)
    monkeypatch.setattr(writer, "STRIP_MEMORY", 1)
    monkeypatch.setattr(writer, "PIECE", 8)
    monkeypatch.setattr(writer, "TURNED", 16)
    monkeypatch.setattr(writer, "INLINE_LIMIT", 0)
    values = np.random.default_rng(0).integers(0, 7, shape).astype(np.float32)
    source = stored(tmp_path / "t", values if axis == 0 else np.ascontiguousarray(values.T))
    project = (lambda t: t.parts[0]) if axis == 0 else (lambda t: t.parts[0].T)
    constant = gs.Constant("w", View(source, shape, dtype, axis=axis, project=project))
    out = gs.Variable("y", np.dtype(dtype), shape)
    graph = gs.Graph([gs.Node("Identity", "id", {}, [constant], [out])], [], [out], opset=23, ir_version=10)
    digests = writer.write_model(graph, tmp_path / "m.onnx")
    assert digests == {name: sha256(tmp_path / name) for name in ("m.onnx", "m.onnx.data")}
    model = onnx.load(tmp_path / "m.onnx")
    written = numpy_helper.to_array(model.graph.initializer[0])
    assert written.dtype == np.dtype(dtype)
    assert (written.astype(np.float32) == values).all()


def test_views_of_one_source_read_it_once(tmp_path: Path) -> None:
    reads = []

    class Counting(InMemory):
        def tiles(self):  # type: ignore[no-untyped-def]
            reads.append(1)
            return super().tiles()

    source = Counting(np.ones((64, 64), np.float32))
    names = ("a", "b")
    constants = [gs.Constant(n, View(source, (64, 64), np.float32)) for n in names]
    out = gs.Variable("y", np.float32, (64, 64))
    graph = gs.Graph([gs.Node("Add", "add", {}, constants, [out])], [], [out], opset=23, ir_version=10)
    writer.write_model(graph, tmp_path / "m.onnx")
    assert len(reads) == 1


def test_what_one_source_makes_lies_together_in_the_order_of_the_graph() -> None:
    def constant(name: str, source: InMemory, scale: int) -> gs.Constant:
        return gs.Constant(name, View(source, (64, 64), np.float32, project=lambda tile: tile.parts[0] * scale))

    first, second = (InMemory(np.full((64, 64), value, np.float32)) for value in (1, 2))
    pairs = [[constant(f"a{scale}", first, scale), constant(f"b{scale}", second, scale)] for scale in (3, 5)]
    outs = [gs.Variable(f"y{index}", np.float32, (64, 64)) for index in range(2)]
    nodes = [gs.Node("Add", "", {}, pair, [out]) for pair, out in zip(pairs, outs, strict=True)]
    placed, _ = writer.layout(gs.Graph(nodes, [], outs, opset=23))
    assert [p.name for p in placed] == ["a3", "a5", "b3", "b5"]


def test_a_full_disk_is_said_and_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    out = gs.Variable("y", np.float32, (64, 64))
    constant = gs.Constant("w", View(InMemory(np.ones((64, 64), np.float32)), (64, 64), np.float32))
    graph = gs.Graph([gs.Node("Identity", "id", {}, [constant], [out])], [], [out], opset=23, ir_version=10)
    with pytest.raises(UserError, match="No space left"):
        writer.write_model(graph, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
