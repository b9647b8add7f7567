"""The errors of layers bite: every way to break one layer is found, and that layer is named, and no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.importance import searched
from instantrt.compiler.accuracy.ladder import float_bytes
from instantrt.compiler.accuracy.layer_errors import (
    Graphs,
    TwinLinear,
    aligned,
    bytes_stored,
    check_lowering,
    layers_of,
    probes,
    weight_errors,
    weight_findings,
)
from instantrt.passes.core.lazy import InMemory, Tile
from instantrt.passes.core.quant import Codes, InstantQuant, Quantizer, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.float.scaled import ScaledColumns
from instantrt.passes.qdq.insert_qdq import Decisions, InsertDequantize
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.lower_native_weight_only import LowerNativeWeightOnly
from instantrt.passes.tensorrt.lower_weight_only_gemm import LowerWeightOnlyGemm
from tests.compiler.accuracy_models import FEEDS, WEIGHTS, K, constant, decisions, float_graph, graphs, measured
from tests.graphs import linear_graph

MODES = {
    "a16w8 per channel": (8, K, "float", "exact"),
    "a16w8 groups": (8, 16, "float", "exact"),
    "a16w8 groups, fast": (8, 16, "float", "fast"),
    "a16w4 groups": (4, 16, "float", "fast"),
    "a8w8": (8, K, "int8", "exact"),
}


def make(mode: str) -> Graphs:
    bits, group, activations, preset = MODES[mode]
    return graphs(lambda graph: decisions(graph, bits, group, activations), preset)


@pytest.mark.parametrize("mode", MODES)
def test_a_right_lowering_has_no_findings(mode: str) -> None:
    found = measured(make(mode))
    assert found.findings == []
    assert [row.layer for row in found.rows] == list(WEIGHTS)
    for row in found.rows:
        assert row.weight is not None
        assert 0 < row.added < 0.3
        assert row.lowering < 2e-3


def test_searched_scales_have_no_findings() -> None:
    def with_search(graph: gs.Graph) -> Decisions:
        return {
            path: replace(q, source=searched(q.source, np.geomspace(1e-3, 1, q.shape[1], dtype=np.float32)))
            for path, q in decisions(graph, 4, 16).items()
            if isinstance(q, QuantTensor)
        }

    found = measured(graphs(with_search, "fast"))
    assert found.findings == []
    assert min(row.gain or 0 for row in found.rows) < 1 - 4e-3  # clipped: smaller than by rounding alone


def first(graph: gs.Graph, *names: str) -> np.ndarray:
    """The constant of the first layer that has one of these names."""
    return constant(graph, next(f"first.{name}" for name in names if f"first.{name}" in graph.tensors()))


def scale_off(graph: gs.Graph) -> None:
    first(graph, "scales", "scale_f32", "scale_by_group").flat[5] *= 1.01


def swapped_groups(graph: gs.Graph) -> None:
    scales = first(graph, "scales", "scale_by_group")
    by_group = scales if scales.ndim == 3 else scales.T
    by_group[[0, 1]] = by_group[[1, 0]]


def zero_off(graph: gs.Graph) -> None:
    first(graph, "zeros", "zero_int8", "zero_by_group").flat[7] += 1


def transposed(graph: gs.Graph) -> None:
    packed = first(graph, "b", "codes_int8", "codes_by_group")
    rows = packed.reshape(K, -1)
    square = rows if rows.shape[1] == K else np.stack([rows & 15, rows >> 4], axis=2).reshape(K, K)
    turned = square.T.copy()
    packed[:] = (turned if rows.shape[1] == K else turned[:, 0::2] | (turned[:, 1::2] << 4)).reshape(packed.shape)


def zeroed_bias(graph: gs.Graph) -> None:
    constant(graph, "first.bias")[:] = 0


def dropped_bias(graph: gs.Graph) -> None:
    add = next(node for node in graph.nodes if node.name == "first/Add")
    add.outputs[0].outputs[0].inputs[0] = add.inputs[0]
    graph.cleanup().toposort()


MUTATIONS: dict[Callable[[gs.Graph], None], tuple[str, ...]] = {
    scale_off: ("a16w8 per channel", "a16w8 groups", "a16w8 groups, fast", "a16w4 groups", "a8w8"),
    swapped_groups: ("a16w8 groups", "a16w8 groups, fast", "a16w4 groups"),
    zero_off: ("a16w8 per channel", "a16w8 groups", "a16w8 groups, fast", "a16w4 groups"),
    transposed: ("a16w8 per channel", "a16w8 groups", "a16w4 groups"),
    zeroed_bias: ("a16w8 per channel", "a16w4 groups"),
    dropped_bias: ("a16w8 per channel", "a16w4 groups"),
}


@pytest.mark.parametrize(
    ("mutate", "mode"),
    [pytest.param(m, mode, id=f"{m.__name__}-{mode}") for m, modes in MUTATIONS.items() for mode in modes],
)
def test_a_broken_artifact_is_found_and_its_layer_named(mutate: Callable[[gs.Graph], None], mode: str) -> None:
    form = make(mode)
    assert form.lowered is not None
    mutate(form.lowered)
    findings = measured(form).findings
    assert findings
    assert all(finding.startswith("first: ") for finding in findings), findings


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_are_held_against_the_largest_of_their_channel(wrong: bool) -> None:
    """One that no probe meets, and that all the others of its channel are rounded by; a wrong scale shows."""
    w = np.random.default_rng(0).standard_normal((8, 1536)).astype(np.float32) / 50
    unmet = int(np.flatnonzero(probes(TwinLinear("q", "x", "y.q", w.shape, None, None)).sum((0, 1)) == 0)[0])
    w[:4, unmet] = 5 * np.arange(1, 5)
    source = InstantQuant("q", InMemory(w), 4, 1536, False, np.dtype(np.float16))
    quant = QuantTensor("q", source, w.shape, 4, 1536, False, np.dtype(np.float16))
    canonical = run(linear_graph({"q": w}), [InsertDequantize({"q": quant})], PassLog())
    lowered = run(canonical.copy(), cast_compute_type(np.dtype(np.float16)), PassLog())
    run(lowered, [LowerNativeWeightOnly(np.dtype(np.float16))], PassLog())
    if wrong:
        name = next(t for t in lowered.tensors() if t.endswith("/scale"))
        lowered.tensors()[name].values = lowered.tensors()[name].values * np.float16(1.01)
    (layer,) = layers_of(None, canonical)
    x = np.random.default_rng(1).standard_normal((1, 4, 1536)).astype(np.float32)
    check = check_lowering(layer, canonical, lowered, np.dtype(np.float16), x, x @ w.T)
    assert (check.probe > check.bound.probe) == wrong


def test_a_weight_that_no_token_meets_is_checked_all_the_same() -> None:
    """One-hot probes reach inputs that are zero in the data."""
    form, unmet = make("a16w8 groups, fast"), FEEDS["x"].copy()
    unmet[..., :16] = 0
    assert form.lowered is not None
    constant(form.lowered, "first.scales")[5, 0] *= 1.01
    (finding,) = measured(form, {"x": unmet}).findings
    assert finding.startswith("first: lowering error of the weights")


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
def test_a_plugin_runs_through_its_reference_and_a_wrong_scale_in_it_is_found(bits: int, group: int) -> None:
    form = graphs(lambda graph: decisions(graph, bits, group))
    half = np.dtype(np.float16)
    lowered = run(form.canonical.copy(), cast_compute_type(half), PassLog())
    form = replace(form, lowered=run(lowered, [LowerWeightOnlyGemm(half)], PassLog()), dtype=half)
    assert [node.op for node in lowered.nodes].count("WeightOnlyGemm") == 2
    assert measured(form).findings == []
    affine = next(n for n in lowered.nodes if n.op == "WeightOnlyGemm").inputs[2]
    affine.values = np.array(affine.values)
    affine.values[0, 10] *= np.float16(1.01)  # the scale of channel 5
    findings = measured(form).findings
    assert findings
    assert all(finding.startswith("first: ") for finding in findings), findings


@dataclass(frozen=True)
class Tampered(InstantQuant):
    """A quantizer with a mistake."""

    mistake: str = ""

    def tiles(self) -> Iterator[Tile]:
        for tile in super().tiles():
            yield Tile(tile.start, MISTAKES[self.mistake](Codes(*tile.parts)))


MISTAKES: dict[str, Callable[[Codes], Codes]] = {
    "scale": lambda b: b._replace(scale=b.scale * np.float32(1.01)),
    "groups": lambda b: b._replace(scale=b.scale[:, ::-1]),
    "zero": lambda b: b._replace(zero=b.zero + np.uint8(1)),
    "transposed": lambda b: b._replace(codes=b.codes.T),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_quantizer_is_found_too(mistake: str, bits: int) -> None:
    def chosen(graph: gs.Graph) -> Decisions:
        table = dict(decisions(graph, bits, 16))
        first = table["first"]
        assert isinstance(first, QuantTensor)
        s = first.source
        assert isinstance(s, InstantQuant)
        wrong = Tampered(s.name, s.weight, s.bits, s.group_size, s.symmetric, s.scale_dtype, mistake)
        return table | {"first": replace(first, source=wrong)}

    findings = measured(replace(graphs(chosen), lowered=None)).findings
    assert findings
    assert all(finding.startswith("first: ") for finding in findings), findings


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale_type", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_rounded_scale_is_no_mistake(scale_type: type, bits: int, symmetric: bool) -> None:
    """A bfloat16 scale of 8-bit codes may be half a percent short: the ends of the range are then a step away."""
    w = np.random.default_rng(1).standard_normal((512, 256)).astype(np.float32)
    dtype = np.dtype(scale_type)

    def findings(mistake: float) -> list[str]:
        source = InstantQuant("w", InMemory(w), bits, 256, symmetric, dtype)
        quant = QuantTensor("w", source, w.shape, bits, 256, symmetric, dtype)
        _, steps, gain = weight_errors(quant, InMemory(w * np.float32(mistake)))
        return weight_findings(TwinLinear("w", "x", "y", w.shape, quant, InMemory(w)), steps, gain)

    assert findings(1) == []
    assert findings(1.02)


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    form = make("a16w8 per channel")
    bias = form.canonical.tensors()["second.bias"]
    bias.values = np.where(np.arange(K) == 3, np.inf, bias.values).astype(np.float32)
    product = np.full(K, 3e38, np.float32)
    form.canonical.tensors()["first.bias"].values = product
    found = measured(form)
    assert found.first_bad["twin"] == "second.product"
    assert "twin: tensor second.product is not finite" in found.findings
    assert "float" not in found.first_bad


def test_layers_end_behind_their_bias() -> None:
    graph = float_graph()
    assert [(layer.x, layer.y) for layer in layers_of(graph, graph)] == [
        ("x", "first.out"),
        ("first.relu", "second.out"),
    ]


def test_errors_of_a_weight_do_not_depend_on_its_tiles() -> None:
    """Float and quantized rows may come in different tiles; the figures are those of the whole matrices."""

    @dataclass(frozen=True, eq=False)
    class Chopped(InMemory):
        rows: int = 5

        def tiles(self) -> Iterator[Tile]:
            for start in range(0, len(self.array), self.rows):
                yield Tile(start, (self.array[start : start + self.rows],))

    graph = float_graph()
    quant = decisions(graph, 4, 16)["first"]
    assert isinstance(quant, QuantTensor)
    whole = weight_errors(quant, InMemory(WEIGHTS["first"]))
    assert weight_errors(quant, Chopped(WEIGHTS["first"], 5)) == pytest.approx(whole, rel=1e-12)
    assert sum(len(w) for w, _ in aligned(Chopped(WEIGHTS["first"], 7), quant)) == K


def test_piled_up_error_includes_what_came_before() -> None:
    """With the first layer left float in the twin, the second one's two errors are the same; else they are not."""
    rows = {row.layer: row for row in measured(make("a16w4 groups")).rows}
    assert rows["first"].added == pytest.approx(rows["first"].piled_up)
    assert rows["second"].piled_up > 1.1 * rows["second"].added
    graph = float_graph()
    only = {path: q for path, q in decisions(graph, 4, 16).items() if path == "second"}
    twin = pipeline.quantize(graph.copy(), only, PassLog())
    second = measured(Graphs(canonical=twin, floating=graph)).rows[1]
    assert second.added == pytest.approx(second.piled_up)


def test_what_a_weight_takes_in_the_checkpoint_does_not_depend_on_what_is_folded_into_it() -> None:
    stored = InMemory(np.ones((4, 8), np.float32))
    folded = ScaledColumns(stored, b"")
    weights = (stored, folded, ScaledColumns(folded, b""))
    assert [bytes_stored((4, 8), weight) for weight in weights] == [128, 128, 128]
    for quant in decisions(float_graph(), 8, -1).values():  # a budget counts a layer that stays float in the same way
        assert isinstance(quant, QuantTensor)
        assert isinstance(quant.source, Quantizer)
        folded = ScaledColumns(quant.source.weight, b"")
        other = replace(quant, source=replace(quant.source, weight=folded))
        assert float_bytes(other) == float_bytes(quant) == 4 * math.prod(quant.shape)
