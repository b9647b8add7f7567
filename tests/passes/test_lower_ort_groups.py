"""Group-wise weights on a CPU, exactly: by a Scan over groups for int8 tokens, by two limbs for float ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.lazy import InMemory, View, view_of
from instantrt.passes.core.quant import Activations, InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.qdq.insert_qdq import InsertDequantize
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from tests.graphs import evaluate, linear_graph, per_row, tokens, weights

F32 = np.dtype(np.float32)


def lowered_by(canonical: gs.Graph, *, signed: bool = True, steps: bool = True) -> gs.Graph:
    passes = linear_passes("exact", signed=signed, steps=steps)
    lowered = run(canonical.copy(), passes, PassLog())
    verify(lowered, Stage.ONNXRUNTIME)
    return lowered


def canonical_of(
    w: dict[str, np.ndarray], bits: int, group_size: int, activations: Activations, symmetric: bool = False
) -> gs.Graph:
    """The Q/DQ form of a linear for each weight, as a checkpoint of that kind gives it."""
    table = {}
    for path, matrix in w.items():
        group = matrix.shape[1] if group_size == -1 else group_size
        source = InstantQuant(path, InMemory(matrix), bits, group, symmetric, F32)
        table[path] = QuantTensor(path, source, matrix.shape, bits, group, symmetric, F32, activations)
    return run(linear_graph(w), (InsertDequantize(table), QuantizeActivations()), PassLog())


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("signed", [False, True], ids=["u8", "s8"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 32), (4, 64), (4, -1)])
def test_int8_tokens_are_the_twin(bits: int, group: int, symmetric: bool, signed: bool, tmp_path: Path) -> None:
    w, x = weights(), tokens()
    canonical = canonical_of(w, bits, group, "int8", symmetric)
    twin = evaluate(canonical, {"x": x}, tmp_path)
    lowered = lowered_by(canonical, signed=signed)
    assert ops(lowered).count("Scan") == (0 if group == -1 else 3)
    assert ops(lowered).count("QuantizeLinear") == 2
    for got, want in zip(evaluate(lowered, {"x": x}, tmp_path), twin, strict=True):
        assert per_row(got, want) < 4e-6


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (8, 128), (4, 16), (4, 128)])
def test_float_tokens_lose_less_than_bfloat16_would(bits: int, group: int, tmp_path: Path) -> None:
    w, x = weights(), tokens()
    canonical = canonical_of(w, bits, group, "float")
    twin = evaluate(canonical, {"x": x}, tmp_path)
    lowered = lowered_by(canonical)
    assert ops(lowered).count("MatMulNBits") == 4  # the limbs of one x serve all its consumers
    for got, want in zip(evaluate(lowered, {"x": x}, tmp_path), twin, strict=True):
        assert per_row(got, want) < 5e-4


@pytest.mark.parametrize(("bits", "group"), [(8, 48), (4, 16), (4, 24)])
def test_many_rows_meet_the_twins_floats(bits: int, group: int, tmp_path: Path) -> None:
    w, x = weights(240), tokens(240)
    canonical = canonical_of(w, bits, group, "float")
    twin = evaluate(canonical, {"x": x}, tmp_path)
    lowered = lowered_by(canonical, steps=False)
    assert ops(lowered).count("MatMul") == 3
    for got, want in zip(evaluate(lowered, {"x": x}, tmp_path), twin, strict=True):
        assert per_row(got, want) < 2e-6


@pytest.mark.parametrize(("k", "block", "padded"), [(256, 128, 256), (192, 64, 192), (96, 32, 96), (200, 128, 256)])
def test_a_channels_blocks_divide_it_or_its_inputs_are_padded(k: int, block: int, padded: int) -> None:
    lowered = lowered_by(canonical_of(weights(k), 4, -1, "float"))
    products = [node.attrs for node in lowered.nodes if node.op == "MatMulNBits" and node.name in ("q", "k", "v")]
    assert [(attrs["block_size"], attrs["K"]) for attrs in products] == [(block, padded)] * 3
    assert ops(lowered).count("Pad") == (k != padded)


@pytest.mark.parametrize("name", ["q.codes_int8", "q.zeros_int8", "q.scales_f32"])
def test_the_bounds_bite(name: str, tmp_path: Path) -> None:
    w, x = weights(), tokens()
    canonical = canonical_of(w, 4, 32, "int8")
    twin = evaluate(canonical, {"x": x}, tmp_path)
    lowered = lowered_by(canonical)
    constant = lowered.tensors()[name]
    assert isinstance(view_of(constant), View)
    values = np.array(view_of(constant).load())
    first = (0,) * values.ndim
    values[first] = values[first] * 1.01 if values.dtype == np.float32 else values[first] + 1
    constant.values = values
    got = evaluate(lowered, {"x": x}, tmp_path)
    assert max(per_row(a, b) for a, b in zip(got, twin, strict=True)) > 1e-5
