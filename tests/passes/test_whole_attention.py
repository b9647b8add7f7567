"""Attention without a cache as one operator, of exports' forms: rows padded on both sides, and rows hidden whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.whole_attention import LowerToAttention
from tests.graphs import evaluate, relative

HEADS = """
   q4 = Reshape (q, split)  k4 = Reshape (k, split)  v4 = Reshape (v, split)
   qh = Transpose <perm = [0, 2, 1, 3]> (q4)  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
   kt = Transpose <perm = [0, 2, 3, 1]> (k4)
   product = MatMul (qh, kt)  scores = Div (product, root)
   mask = Where (seen, zero, low)  masked = Add (mask, scores)
   weights = Softmax <axis = -1> (masked)
"""
PLAIN = "   heads = MatMul (weights, vh)"
GUARDED = "   odd = IsNaN (weights)  whole = Where (odd, zero, weights)  heads = MatMul (whole, vh)"
SHAPES = (
    "float[b,s,4,8] q4, float[b,s,4,8] k4, float[b,s,4,8] v4, float[b,4,s,8] qh, float[b,4,8,s] kt, float[b,4,s,8] vh"
)


@pytest.mark.parametrize("queries", ["s", "1"])
@pytest.mark.parametrize(
    ("end", "low"), [(PLAIN, "-3.4028235e38"), (PLAIN, "-10000"), (GUARDED, "-3.4028235e38"), (GUARDED, "-inf")]
)
def test_a_query_that_sees_no_key_keeps_what_it_had(end: str, low: str, queries: str, tmp_path: Path) -> None:
    """Their mean where the mask is a number, zeros where it is minus infinity and zeros stand for NaN."""
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    g (float[b,s,32] q, float[b,s,32] k, float[b,s,32] v, bool[b,1,{queries},s] seen) => (float[b,s,32] y)
    <int64[4] split = {{0,0,4,8}}, int64[3] join = {{0,0,32}}, float root = {{2.8}}, float zero = {{0}},
     float low = {{{low}}}, {SHAPES}> {{ {HEADS} {end}
     turned = Transpose <perm = [0, 2, 1, 3]> (heads)  y = Reshape (turned, join) }}"""
    before = gs.import_onnx(onnx.parser.parse_model(text))
    after = run(before.copy(), [LowerToAttention()], log := PassLog())
    assert len(log.applied(LowerToAttention)) == 1
    assert "Attention" in [node.op for node in after.nodes]
    random = np.random.default_rng(0)
    seen = np.ones((4, 1, 6 if queries == "s" else 1, 6), bool)
    seen[1, :, :, 4:] = seen[2, :, :, :3] = seen[3] = False  # padded on the right, on the left, and nothing else
    feeds = {name: random.standard_normal((4, 6, 32)).astype(np.float32) for name in "qkv"} | {"seen": seen}
    want, got = (evaluate(graph, feeds, tmp_path)[0] for graph in (before, after))
    assert all(relative(a, b) < 1e-6 if b.any() else not a.any() for a, b in zip(got, want, strict=True))
    assert want[3].any() == (low != "-inf")
