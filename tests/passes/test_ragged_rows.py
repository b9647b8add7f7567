"""Rows of different lengths in a cache that is updated in place: each row of a batch equals the row alone.

The cache of ONNX Runtime's GroupQueryAttention, and that of an engine: TensorScatter under standard attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.passes.core.rewrite import Pass, PassLog, run
from instantrt.passes.ort.attention import attention
from instantrt.passes.ort.rotary import RotateInAttention
from instantrt.passes.tensorrt.kv_in_place import kv_in_place

Array = npt.NDArray[Any]
LENGTHS = (5, 17, 2, 40)
STEPS = 4
LIMIT = 64


def session_of(graph: gs.Graph, path: Path) -> ort.InferenceSession:
    write_model(graph, path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def expected(tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> list[Array]:
    """Logits [S, vocab] of each text, all at once and without a cache, by the graph before the lowering."""
    session = session_of(tiny_float.graph.copy(), tmp_path_factory.mktemp("standard") / "model.onnx")
    return [whole(session, text) for text in texts()]


FORMS: dict[str, tuple[Pass, ...]] = {
    "group query attention": attention(),
    "rotated inside of it": (*attention(), RotateInAttention(LIMIT)),
    "scatter": tuple(kv_in_place(LIMIT)),
}


@pytest.fixture(scope="module", params=FORMS)
def session(
    request: pytest.FixtureRequest, tiny_float: FloatModel, tmp_path_factory: pytest.TempPathFactory
) -> ort.InferenceSession:
    graph = run(tiny_float.graph.copy(), FORMS[request.param], PassLog())
    return session_of(graph, tmp_path_factory.mktemp("ragged") / "model.onnx")


def cache_of(batch: int, content: float) -> dict[str, Array]:
    shape = (batch, 2, LIMIT, 64)
    return {f"{i}.{part}": np.full(shape, content, np.float32) for i in range(4) for part in ("key", "value")}


def step(session: ort.InferenceSession, ids: Array, mask: Array, positions: Array, cache: dict[str, Array]) -> Array:
    """Logits of `ids`; the cache grows in place."""
    binding = session.io_binding()
    for name, value in {"input_ids": ids, "attention_mask": mask, "position_ids": positions}.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value, np.int64))
    binding.bind_output("logits")
    for name, buffer in cache.items():
        value = ort.OrtValue.ortvalue_from_numpy(buffer)
        binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        binding.bind_ortvalue_output(f"present.{name}", value)
    session.run_with_iobinding(binding)
    logits: Array = binding.get_outputs()[0].numpy()
    return logits


def texts() -> list[Array]:
    random = np.random.default_rng(0)
    return [random.integers(1, 4000, n + STEPS) for n in LENGTHS]


def whole(session: ort.InferenceSession, text: Array) -> Array:
    ids = text[None].astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(text))[None]}
    past = {f"past_key_values.{name}": buffer[:, :, :0] for name, buffer in cache_of(1, 0.0).items()}
    logits: Array = session.run(["logits"], feeds | past)[0][0]
    return logits


def padded(side: str) -> tuple[Array, Array, list[slice]]:
    """Tokens and mask [rows, width] of all prompts, padded on a side; where each lies."""
    width = max(LENGTHS)
    ids, mask = np.zeros((2, len(LENGTHS), width), np.int64)
    places = [slice(0, n) if side != "left" else slice(width - n, width) for n in LENGTHS]
    for row, (text, place, n) in enumerate(zip(texts(), places, LENGTHS, strict=True)):
        ids[row, place], mask[row, place] = text[:n], 1
    return ids, mask, places


@pytest.mark.parametrize("side", ["right", "left", "right, full mask"])
def test_rows_of_different_lengths(session: ort.InferenceSession, expected: list[Array], side: str) -> None:
    rows, width = texts(), max(LENGTHS)
    ids, mask, places = padded(side)
    cache = cache_of(len(rows), content=3.0)  # old values, which nothing may read
    logits = step(session, ids, mask, np.maximum(mask.cumsum(1) - 1, 0), cache)
    got = [[logits[row, place.stop - 1]] for row, place in enumerate(places)]
    lengths = np.array(LENGTHS)
    for done in range(STEPS):
        if side != "left":  # each row grows in its own place
            total = width + done + 1 if side == "right" else LIMIT
            mask = (np.arange(total) <= (lengths + done)[:, None]).astype(np.int64)
        else:  # all rows grow at the end, as the interface says
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], 1)
        tokens = np.array([[text[n + done]] for text, n in zip(rows, LENGTHS, strict=True)])
        logits = step(session, tokens, mask, (lengths + done)[:, None], cache)
        for row in range(len(rows)):
            got[row].append(logits[row, -1])
    for row, n in enumerate(LENGTHS):
        error = np.abs(np.array(got[row]) - expected[row][n - 1 :]).max()
        assert error <= 1e-4 * np.abs(expected[row]).max(), (row, error)


def test_a_batch_takes_its_prompts_in_pieces(tiny_float: FloatModel, expected: list[Array], tmp_path: Path) -> None:
    graph = run(tiny_float.graph.copy(), FORMS["rotated inside of it"], PassLog())
    session, (ids, mask, _), cache = (
        session_of(graph, tmp_path / "model.onnx"),
        padded("left"),
        cache_of(len(LENGTHS), 3.0),
    )
    assert not [node for node in graph.nodes if node.op == "RotaryEmbedding"]
    positions = np.where(mask, mask.cumsum(1) - 1, LIMIT)  # what is said of padding is nobody's business
    for start in range(0, ids.shape[1], 16):
        piece, seen = slice(start, start + 16), slice(0, start + 16)
        logits = step(session, ids[:, piece], mask[:, seen], positions[:, piece], cache)
    for row, n in enumerate(LENGTHS):
        error = np.abs(logits[row, -1] - expected[row][n - 1]).max()
        assert error <= 1e-4 * np.abs(expected[row]).max(), (row, error)
    beyond = positions[:, piece] + LIMIT  # but no real token is rotated as another
    with pytest.raises(RuntimeError, match=r"position_ids value 64 .* out of range"):
        step(session, ids[:, piece], mask[:, seen], beyond, cache)
