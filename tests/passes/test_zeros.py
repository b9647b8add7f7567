"""Minima, which are zero points that are no codes: the formula, the twin, and every lowering against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import InMemory, Tile, view_of
from instantrt.passes.core.quant import Codes, InstantQuant, QuantTensor, dequantize, quantize_unrounded
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.ort import Preset
from instantrt.passes.ort.expand import ExpandOnLoad
from instantrt.passes.ort.groups import LowerGroups
from instantrt.passes.ort.in_half import KeepScalesInHalf
from instantrt.passes.ort.limbs import ONE_LIMB
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.ort.per_channel import LowerPerChannel
from instantrt.passes.qdq.fold_order import FoldOrder
from instantrt.passes.qdq.insert_qdq import InsertDequantize, quantized
from instantrt.passes.qdq.join_linears import JoinLinears
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from instantrt.passes.tensorrt.lower_native_weight_only import LowerNativeWeightOnly
from instantrt.passes.tensorrt.lower_weight_only_gemm import LowerWeightOnlyGemm
from instantrt.passes.tensorrt.ranges import raised
from tests.graphs import evaluate, linear_graph, per_row, tokens, weights

BFLOAT16, FLOAT16, FLOAT32 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32))
K, GROUP = 256, 32


class Given:
    """A source of ready codes."""

    def __init__(self, block: Codes) -> None:
        self.block = block

    def tiles(self) -> Any:
        yield Tile(0, self.block)


def far(w: np.ndarray, bits: int, group: int) -> QuantTensor:
    """Codes of [n, K] over each group's own range, which may be far from 0."""
    groups = w.reshape(len(w), -1, group)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scale = ((high - low) / (2**bits - 1)).astype(BFLOAT16).astype(np.float32)
    codes = np.clip(np.rint((groups - low[..., None]) / scale[..., None]), 0, 2**bits - 1)
    block = Codes(codes.astype(np.uint8).reshape(w.shape), scale, low)
    return QuantTensor("q", Given(block), w.shape, bits, group, False, BFLOAT16, zero_dtype=FLOAT32)


def instant(path: str, w: np.ndarray, bits: int, group: int, dtype: Any = BFLOAT16) -> QuantTensor:
    source = InstantQuant(path, InMemory(w), bits, group, False, dtype, zero_dtype=dtype)
    return QuantTensor(path, source, w.shape, bits, group, False, dtype, zero_dtype=dtype)


def twin_of(quants: dict[str, QuantTensor], w: dict[str, np.ndarray]) -> gs.Graph:
    graph = run(linear_graph(w), (InsertDequantize(quants), QuantizeActivations()), PassLog())
    verify(graph, Stage.QDQ)
    return graph


def some(bits: int, group: int, kind: str) -> tuple[gs.Graph, dict[str, QuantTensor]]:
    """A twin of three linears with zero points by the formula, or of one whose zero points are far away."""
    w = weights(K)
    if kind == "formula":
        quants = {path: instant(path, rows, bits, group) for path, rows in w.items()}
        return twin_of(quants, w), quants
    one_sided = np.abs(w["q"]) + np.float32(0.1) * np.where(np.arange(64) % 2, 1, -1)[:, None].astype(np.float32)
    quants = {"q": far(one_sided, bits, group)}
    _, scale, minimum = next(iter(quants["q"].source.tiles())).parts
    zero = -minimum / scale
    assert zero.min() < 0
    assert zero.max() > 2**bits - 1
    return twin_of(quants, {"q": one_sided}), quants


FORMS = pytest.mark.parametrize(("bits", "group"), [(4, GROUP), (8, GROUP), (4, 16), (8, 16), (8, K), (4, K)])
KINDS = pytest.mark.parametrize("kind", ["formula", "far"])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_formula_is_the_specs(bits: int, dtype: Any) -> None:
    """In float64; both ends of a range that has 0 inside are codes, to what the types round away."""
    w, top = weights(K)["q"].reshape(64, -1, GROUP), 2**bits - 1
    w[3, 1], w[4, 2], w[5, 3] = np.abs(w[3, 1]), -np.abs(w[4, 2]), 0
    block = quantize_unrounded(w.copy(), bits, dtype, dtype)
    low, high = np.minimum(w.min(axis=-1), 0).astype(np.float64), np.maximum(w.max(axis=-1), 0)
    scale, minimum = block.scale.astype(np.float64), block.zero.astype(np.float64)
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(scale[scale != 1], ((high - low) / top)[scale != 1], rtol=eps)
    np.testing.assert_allclose(minimum, low, rtol=eps)
    assert (minimum / scale % 1 != 0).mean() > 0.5
    steps = np.clip(np.rint((w - minimum[..., None]) / scale[..., None]), 0, top).reshape(64, -1)
    assert (block.codes != steps).mean() < 1e-3  # ties of float32
    error = np.abs(dequantize(block, GROUP).reshape(w.shape) - w).max(axis=-1) / scale
    assert error.max() <= 0.5 + top * eps + 1e-4


@FORMS
@KINDS
def test_the_twin_is_plain_and_says_the_weight(tmp_path: Path, bits: int, group: int, kind: str) -> None:
    canonical, quants = some(bits, group, kind)
    x = tokens(K)
    found = {node.name: quantized(node) for node in canonical.nodes if node.op == "MatMul"}
    assert {name: f.quant for name, f in found.items() if f is not None} == quants
    block = Codes(*next(iter(quants["q"].source.tiles())).parts)
    want = x @ dequantize(block, group).T
    assert per_row(evaluate(canonical.copy(), {"x": x}, tmp_path)[0], want) < 5e-6
    streamed = Evaluation(canonical, {"x": x})
    assert per_row(streamed.peek("y.q"), want) < 5e-6
    assert not any(name.startswith("q.") for name in streamed.values)  # no weight was ever whole


@pytest.mark.parametrize(("steps", "preset", "limit"), [
    (True, "exact", 1.7e-3), (True, "fast", 3e-2), (True, "auto", 3e-2), (False, "exact", 1.7e-3)
])  # fmt: skip
@FORMS
@KINDS
def test_cpu_forms_are_the_twin(
    tmp_path: Path, bits: int, group: int, kind: str, steps: bool, preset: Preset, limit: float
) -> None:
    canonical, _ = some(bits, group, kind)
    x = np.random.default_rng(2).standard_normal((2, 5, K)).astype(np.float32)
    want = evaluate(canonical.copy(), {"x": x}, tmp_path)
    lowered = run(canonical, [*linear_passes(preset, steps=steps), KeepScalesInHalf()], PassLog())
    verify(lowered, Stage.ONNXRUNTIME)
    assert all(quantized(node) is None for node in lowered.nodes)
    if preset == "exact" and group < K:
        limit = 6e-5 if steps else 2e-6  # two limbs of 8 bits by block, or float32
    for got, expected in zip(evaluate(lowered.copy(), {"x": x}, tmp_path), want, strict=True):
        assert per_row(got, expected) < limit
    if "MatMulNBits" in {node.op for node in lowered.nodes} and preset == "fast":
        for node in lowered.nodes:
            node.attrs.update({"accuracy_level": 0} if node.op == "MatMulNBits" else {})
        for got, expected in zip(evaluate(lowered, {"x": x}, tmp_path), want, strict=True):
            assert per_row(got, expected) < 1e-5


def test_what_meets_many_rows_is_expanded_exactly(tmp_path: Path) -> None:
    canonical, _ = some(4, GROUP, "far")
    x = tokens(K)
    (want,) = evaluate(canonical.copy(), {"x": x}, tmp_path)
    (got,) = evaluate(run(canonical, [ExpandOnLoad()], PassLog()), {"x": x}, tmp_path)
    assert per_row(got, want) < 1e-5


def test_group_sums_are_made_once_and_central_codes_lie_once_in_the_file() -> None:
    w = {path: np.random.default_rng(3).standard_normal((32, K)).astype(np.float32) for path in ("q", "k")}
    lowered = run(twin_of({p: instant(p, v, 4, GROUP) for p, v in w.items()}, w), linear_passes("fast"), PassLog())
    assert [node.op for node in lowered.nodes].count("Squeeze") == 1
    contents = [view.content for node in lowered.nodes if node.op == "MatMulNBits" if (view := view_of(node.inputs[3]))]
    assert len(contents) == 2
    assert len(set(contents)) == 1


@pytest.mark.parametrize(
    "the_pass", [LowerGroups(ONE_LIMB), LowerPerChannel(ONE_LIMB, "int8")], ids=["groups", "channel"]
)
def test_int8_activations_have_no_form(the_pass: Any) -> None:
    group = GROUP if isinstance(the_pass, LowerGroups) else K
    w = {"q": weights(K)["q"]}
    q = instant("q", w["q"], 8, group)
    twin = twin_of({"q": QuantTensor(**{**vars(q), "activations": "int8"})}, w)
    log = PassLog()
    run(twin, [the_pass], log)
    assert [e.reason for e in log.rejected()] == ["int8 activations have no form with minima"]


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("plugin", [False, True], ids=["native", "plugin"])
@KINDS
def test_gpu_forms_are_the_twin(kind: str, plugin: bool, dtype: Any) -> None:
    canonical, _ = some(4, GROUP, kind)
    canonical.outputs = canonical.outputs[:1]
    canonical.cleanup()
    x = np.random.default_rng(2).standard_normal((2, 5, K)).astype(dtype)
    want = Evaluation(canonical, {"x": x.astype(np.float32)}).take("y.q")
    canonical.inputs[0].dtype = canonical.outputs[0].dtype = dtype
    lowering = LowerWeightOnlyGemm(dtype) if plugin else LowerNativeWeightOnly(dtype)
    log = PassLog()
    lowered = run(canonical, [lowering], log)
    assert quantized(lowered.nodes[-1]) is None
    assert [dtype.name in e.done for e in log.applied(type(lowering))] == [True]
    got = Evaluation(lowered, {"x": x}).take("y.q").astype(np.float32)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 4 * float(ml_dtypes.finfo(dtype).eps)


def test_joined_linears_are_of_one_kind_of_zero_points(tmp_path: Path) -> None:
    w = {path: rows for path, rows in weights(K).items() if path != "v"}
    quants = {path: instant(path, rows, 4, GROUP) for path, rows in w.items()}
    canonical, x = twin_of(quants, w), tokens(K)
    want = evaluate(canonical.copy(), {"x": x}, tmp_path)
    joined = run(canonical, [JoinLinears(gated=True)], PassLog())
    assert [node.op for node in joined.nodes].count("DequantizeLinear") == 1
    for got, expected in zip(evaluate(joined, {"x": x}, tmp_path), want, strict=True):
        assert per_row(got, expected) < 5e-6
    integer = InstantQuant("k", InMemory(w["k"]), 4, GROUP, False, BFLOAT16)
    quants["k"] = QuantTensor("k", integer, w["k"].shape, 4, GROUP, False, BFLOAT16)
    mixed = run(twin_of(quants, w), [JoinLinears(gated=True)], PassLog())
    assert [node.op for node in mixed.nodes].count("DequantizeLinear") == 2


def test_an_order_is_folded_into_rows_with_float_zero_points(tmp_path: Path) -> None:
    w = {"q": weights(K)["q"]}
    graph, x = twin_of({"q": instant("q", w["q"], 4, GROUP)}, w), tokens(K)
    order = np.random.default_rng(4).permutation(64)
    ordered = add(graph, "Gather", [graph.outputs[0], gs.Constant("order", order)], "ordered", axis=-1)
    graph.outputs = [add(graph, "Neg", [ordered], gs.Variable("y", np.float32, ["b", "s", 64]))]
    (want,) = evaluate(graph.copy(), {"x": x}, tmp_path)
    folded = run(graph, [FoldOrder(frozenset({"y"}))], PassLog())
    assert "Gather" not in {node.op for node in folded.nodes}
    np.testing.assert_array_equal(evaluate(folded, {"x": x}, tmp_path)[0], want)


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = weights(K)["q"]
    w[5, 40] = np.nan
    with pytest.raises(UserError, match=r"q\[5, 40\]: the weight is not finite"):
        list(instant("q", w, 4, GROUP).tiles())


def test_one_zero_point_off_is_seen(tmp_path: Path) -> None:
    """A sixteenth of a step in one group of one row."""
    canonical, quants = some(4, GROUP, "formula")
    block = next(iter(quants["q"].source.tiles())).parts
    zero = block[2].copy()
    zero[7, 3] += 1 / 16
    wrong = Given(Codes(block[0], block[1], zero))
    off = twin_of({**quants, "q": QuantTensor(**{**vars(quants["q"]), "source": wrong})}, weights(K))
    x = np.random.default_rng(2).standard_normal((2, 5, K)).astype(np.float32)
    got, want = (evaluate(graph, {"x": x}, tmp_path)[0] for graph in (off, canonical))
    assert np.abs(got - want)[..., 7].max() / np.abs(want).max() > 1e-4


@pytest.mark.parametrize("plugin", [False, True], ids=["native", "plugin"])
@KINDS
def test_gpu_scales_too_small_for_float16_are_raised(kind: str, plugin: bool) -> None:
    """Some groups of rows whose other groups are a thousand times larger."""
    canonical, quants = some(8, GROUP, kind)
    block = Codes(*next(iter(quants["q"].source.tiles())).parts)
    factor = np.where(np.arange(K // GROUP) % 2, np.float32(1000), np.float32(1)) * np.float32(2e-5) / block.scale
    small = Codes(block.codes, block.scale * factor, block.zero * factor)
    object.__setattr__(quants["q"], "source", Given(small))
    canonical.outputs = canonical.outputs[:1]
    canonical.cleanup()
    x = np.random.default_rng(2).standard_normal((2, 5, K)).astype(np.float16)
    want = Evaluation(canonical, {"x": x.astype(np.float32)}).take("y.q")
    canonical.inputs[0].dtype = canonical.outputs[0].dtype = FLOAT16
    lowering = LowerWeightOnlyGemm(FLOAT16) if plugin else LowerNativeWeightOnly(FLOAT16)
    got = Evaluation(run(canonical, [lowering], PassLog()), {"x": x}).take("y.q").astype(np.float32)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 4 * float(np.finfo(FLOAT16).eps)
    off = raised(small, quants["q"], FLOAT16)
    assert off.scale.min() == np.finfo(FLOAT16).tiny
    moved = np.abs(dequantize(off, GROUP) - dequantize(small, GROUP))
    assert 0 < moved.max() <= 0.501 * np.finfo(FLOAT16).tiny
