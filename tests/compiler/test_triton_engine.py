"""The generate model's two engines against each other: GroupQueryAttention in place, standard attention row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.serving.runtime.onnx_engine import ENGINES, ConcatEngine, SharedEngine
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.attention import ATTENTION

Engines = tuple[SharedEngine | ConcatEngine, ...]


@pytest.fixture(scope="module")
def engines(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder: Path = tmp_path_factory.mktemp("engines")
    standard, lowered = tiny_float.graph.copy(), tiny_float.graph.copy()
    run(lowered, ATTENTION, PassLog())
    write_model(standard, folder / "concat.onnx")
    write_model(lowered, folder / "shared.onnx")
    return tuple(ENGINES[kind](folder / f"{kind}.onnx", 3, 64) for kind in ("concat", "shared"))


def test_rows_join_grow_and_move(engines: Engines) -> None:
    """A prompt in one piece and one in two; steps of both; a third joins; the first leaves, the last takes its row."""
    random = np.random.default_rng(0)
    texts = random.integers(1, 4000, (3, 40))
    seen: list[list[np.ndarray]] = []
    for engine in engines:
        out = [
            engine.prefill(0, texts[0, :9], 0),
            engine.prefill(1, texts[1, :20], 0),
            engine.prefill(1, texts[1, 20:25], 20),
        ]
        for step in range(3):
            out += list(engine.decode(texts[[0, 1], [9 + step, 25 + step]], np.array([9, 25]) + step).copy())
        out.append(engine.prefill(2, texts[2, :2], 0))
        out += list(engine.decode(texts[[0, 1, 2], [12, 28, 2]], np.array([12, 28, 2])).copy())
        engine.move(2, 0, 3)
        for step in range(3):
            out += list(engine.decode(texts[[2, 1], [3 + step, 29 + step]], np.array([3, 29]) + step).copy())
        out.append(engine.prefill(2, texts[0, :4], 0))  # the row is taken again: nothing of its past shows
        seen.append(out)
    expected, got = np.array(seen)
    assert expected.shape == (3 + 6 + 1 + 3 + 6 + 1, 4096)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
