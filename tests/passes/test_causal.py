"""Which masks are causal is seen in their values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.frontend import load
from instantrt.passes.core.causal import PROBES, masks, sees_ahead, unlike, unlike_causal, values_of
from instantrt.passes.core.lazy import Tile, View
from instantrt.passes.core.rewrite import PassLog
from tests.models import make

LOW = np.finfo(np.float32).min


def mask_of(probe: object, see: object) -> np.ndarray:
    """[B, 1, S, T]: `see(query, key)` by place in the row, which ends where its attention_mask does."""
    allowed, new = probe.mask, probe.new  # type: ignore[attr-defined]
    keys = np.arange(allowed.shape[1])
    end = np.where(allowed, keys + 1, 0).max(1)
    queries = np.maximum(end - new, 0)[:, None] + np.arange(new)
    seen = see(queries[:, None, :, None], keys) & allowed[:, None, None, :]  # type: ignore[operator]
    return np.where(seen, 0, LOW).astype(np.float32)


CAUSAL = {
    "causal": lambda q, k: k <= q,
    "a window": lambda q, k: (k <= q) & (q - k < 3),
    "chunks": lambda q, k: (k <= q) & (k // 4 == q // 4),
}
OTHERS = {
    "both ways": lambda q, k: k == k + 0 * q,
    "a window to both sides": lambda q, k: abs(q - k) < 3,
    "a prefix": lambda q, k: (k <= q) | (k < 2),
    "one ahead": lambda q, k: k <= q + 1,
    "not itself": lambda q, k: k < q,
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_taken(name: str) -> None:
    assert [unlike(probe, mask_of(probe, CAUSAL[name])) for probe in PROBES] == ["", "", ""]


@pytest.mark.parametrize("name", OTHERS)
def test_another_is_not(name: str) -> None:
    assert any(unlike(probe, mask_of(probe, OTHERS[name])) for probe in PROBES)


def test_why_a_mask_cannot_be_computed() -> None:
    """Also where the error has no text."""

    class Broken:
        def tiles(self) -> Iterator[Tile]:
            raise ValueError

    given, weight = gs.Variable("attention_mask", np.float32), gs.Constant("w", View(Broken(), (1,), np.float32))
    mask = gs.Variable("mask", np.float32)
    graph = gs.Graph([gs.Node("Add", "add", inputs=[given, weight], outputs=[mask])], [given], [mask])
    found = values_of(graph, mask, {"attention_mask": np.ones((1, 1, 2, 2), np.float32)})
    assert found == "the mask cannot be computed apart: ValueError"


@pytest.mark.parametrize("change", ["rows", "rank", "heads", "type"])
def test_a_mask_of_another_shape_is_not_taken(change: str) -> None:
    probe = PROBES[0]
    mask = mask_of(probe, CAUSAL["causal"])
    changed = {"rows": mask[:1], "rank": mask[:, 0], "heads": mask.repeat(4, 1), "type": mask == 0}[change]
    assert unlike(probe, changed).startswith("the mask is ")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layers"), [("qwen3", 1), ("mistral", 1), ("gemma2", 2)])  # of each kind one
@pytest.mark.parametrize("causal", [True, False])
def test_a_models_masks_say_what_its_config_does(tmp_path: Path, family: str, layers: int, causal: bool) -> None:
    make(family, tmp_path / "m", is_causal=causal, num_hidden_layers=layers)
    graph = pipeline.normalize(load(tmp_path / "m").graph, PassLog())
    assert sees_ahead(graph) is not causal
    attended = [n.inputs[3] for n in graph.nodes if n.op == "Attention"]
    assert {unlike_causal(graph, mask) == "" for mask in attended} <= {causal}
    assert isinstance(next(masks(graph)), gs.Tensor)
