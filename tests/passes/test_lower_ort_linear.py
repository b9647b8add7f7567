"""Every CPU lowering against the twin on the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.ort.nbits import LowerToMatMulNBits
from tests.graphs import evaluate, linear_graph, per_row, quantize, relative, tokens, weights


@pytest.mark.parametrize("signed", [False, True], ids=["u8", "s8"])
def test_a8w8_is_the_twin(tmp_path: Path, signed: bool) -> None:
    w, x = weights(), tokens()
    canonical = quantize(linear_graph(w), w, bits=8, activations="int8")
    twin = evaluate(canonical, {"x": x}, tmp_path)
    lowered = run(canonical.copy(), linear_passes("exact", signed=signed), PassLog())
    verify(lowered, Stage.ONNXRUNTIME)
    for got, want in zip(evaluate(lowered, {"x": x}, tmp_path), twin, strict=True):
        assert per_row(got, want) < 2e-6


@pytest.mark.parametrize("steps", [True, False], ids=["steps", "rows"])
def test_two_limbs_add_less_than_bfloat16_would(tmp_path: Path, steps: bool) -> None:
    w, x = weights(), tokens()
    canonical = quantize(linear_graph(w), w, bits=8)
    twin = evaluate(canonical, {"x": x}, tmp_path)
    lowered = run(canonical.copy(), linear_passes("exact", steps=steps), PassLog())
    for got, want in zip(evaluate(lowered, {"x": x}, tmp_path), twin, strict=True):
        assert per_row(got, want) < 1.7e-3


@pytest.mark.parametrize(
    ("bits", "group", "k"),
    [(4, -1, 256), (4, -1, 96), (4, -1, 80), (4, -1, 100), (4, -1, 17), (8, -1, 99), (4, 48, 96), (8, 32, 96)],
)
def test_the_exact_preset_keeps_activations_whatever_k_is(tmp_path: Path, bits: int, group: int, k: int) -> None:
    """Fourteen bits of each token at least; those of the fast preset are seen."""
    w, x = {"q": weights(k)["q"], "v": weights(k)["v"]}, tokens(k)
    canonical = quantize(linear_graph(w), w, bits=bits, group_size=group)
    twin = evaluate(canonical, {"x": x}, tmp_path)
    exact = run(canonical.copy(), linear_passes("exact"), PassLog())
    assert max(map(per_row, evaluate(exact, {"x": x}, tmp_path), twin)) < 1.7e-3
    fast = run(canonical.copy(), linear_passes("fast"), PassLog())
    assert max(map(per_row, evaluate(fast, {"x": x}, tmp_path), twin)) > 5e-3


def test_the_exact_preset_never_rounds_to_int8_instead() -> None:
    """What none of its forms takes is refused, not left to the operator that rounds."""
    passes = {preset: [type(p) for p in linear_passes(preset)] for preset in ("exact", "fast")}
    assert LowerToMatMulNBits not in passes["exact"]
    assert LowerToMatMulNBits in passes["fast"]


def test_limbs_are_made_once_for_all_consumers() -> None:
    w = weights()
    lowered = run(quantize(linear_graph(w), w, bits=8), linear_passes("exact"), PassLog())
    ops = [n.op for n in lowered.nodes]
    assert ops.count("QuantizeLinear") == 2
    assert ops.count("MatMulIntegerToFloat") == 3


@pytest.mark.parametrize(
    ("bits", "group", "k"),
    [(8, 32, 256), (8, 64, 192), (8, -1, 256), (8, -1, 200), (4, 32, 256), (4, 48, 240), (4, -1, 200)],
)
def test_matmulnbits_holds_the_codes(tmp_path: Path, bits: int, group: int, k: int) -> None:
    """At accuracy level 0 the operator computes in float: the layout must reproduce the twin exactly."""
    w, x = weights(k), tokens(k)
    plain = np.random.default_rng(2).standard_normal((1, 4, k)).astype(np.float32)
    canonical = quantize(linear_graph(w), w, bits=bits, group_size=group)
    twin = evaluate(canonical, {"x": x}, tmp_path)
    plain_twin = evaluate(canonical, {"x": plain}, tmp_path)
    lowered = run(canonical.copy(), [LowerToMatMulNBits()], PassLog())
    fast = evaluate(lowered, {"x": plain}, tmp_path)
    for node in lowered.nodes:
        node.attrs["accuracy_level"] = 0
    exact = evaluate(lowered, {"x": x}, tmp_path)
    for got, want in zip(exact, twin, strict=True):
        assert per_row(got, want) < 2e-6
    for got, want in zip(fast, plain_twin, strict=True):
        assert relative(got, want) < 1.2e-2  # int8 activations, a scale for each block


def test_groups_that_matmulnbits_cannot_express_are_refused() -> None:
    w, log = weights(200), PassLog()
    run(quantize(linear_graph(w), w, bits=4, group_size=40), [LowerToMatMulNBits()], log)
    assert {e.reason for e in log.rejected()} == {"group_size 40 is no multiple of 16, which MatMulNBits needs"}


@pytest.mark.parametrize("constant", ["scale", "zero", "codes"])
def test_the_bounds_bite(tmp_path: Path, constant: str) -> None:
    """One channel's scale off by one percent, one zero point off by one, two channels' codes swapped: all seen."""
    w, x = weights(), tokens()
    canonical = quantize(linear_graph(w), w, bits=8, activations="int8")
    twin = evaluate(canonical, {"x": x}, tmp_path)
    broken = canonical.copy()
    damage(broken, constant)
    got = evaluate(broken, {"x": x}, tmp_path)
    assert max(per_row(a, b) for a, b in zip(got, twin, strict=True)) > 1e-4


def damage(graph: gs.Graph, constant: str) -> None:
    tensor = graph.tensors()[f"q.{constant}"]
    values = tensor.values.copy()
    if constant == "scale":
        values[3] *= 1.01
    elif constant == "zero":
        values[3] += 1
    else:
        values[:, [3, 4]] = values[:, [4, 3]]
    tensor.values = values


@pytest.mark.parametrize(("bits", "activations"), [(8, "float"), (4, "float"), (8, "int8")])
def test_a_module_used_twice_is_quantized_once(tmp_path: Path, bits: int, activations: str) -> None:
    w = {"fc": (np.random.default_rng(0).standard_normal((64, 64)) * 0.1).astype(np.float32)}
    graph = linear_graph(w)
    again = gs.Variable("y.again", np.float32, ["b", "s", 64])
    graph.nodes.append(gs.Node("MatMul", "fc#2", {}, [graph.outputs[0], graph.nodes[0].inputs[1]], [again]))
    graph.outputs = [again]
    canonical = quantize(graph, w, bits=bits, activations=activations)
    assert sum(n.op == "DequantizeLinear" and n.outputs[0].name == "fc.dequantized" for n in canonical.nodes) == 1
    x = np.random.default_rng(1).standard_normal((1, 3, 64)).astype(np.float32)
    (twin,) = evaluate(canonical, {"x": x}, tmp_path)
    lowered = run(canonical.copy(), linear_passes("exact"), PassLog())
    (got,) = evaluate(lowered, {"x": x}, tmp_path)
    assert relative(got, twin) < 2e-2
