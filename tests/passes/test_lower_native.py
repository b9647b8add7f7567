"""The native TensorRT lowerings against the twin, on the same inputs, for each method, type and zero point."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import InMemory, Tile, View, view_of
from instantrt.passes.core.quant import Codes, InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.core.verify import Stage, verify
from instantrt.passes.qdq.insert_qdq import InsertDequantize
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.explicit_scales import ExplicitScales
from instantrt.passes.tensorrt.lower_native_int8 import LowerNativeInt8
from instantrt.passes.tensorrt.lower_native_weight_only import LowerNativeWeightOnly
from tests.graphs import FLOAT32, evaluate, linear_graph

FLOAT16, BFLOAT16 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
K = 256
# Of one output channel's norm, in units of the type's rounding: x @ w, the correction and their sum each round once.
BOUND = 4


def weights(k: int = K) -> dict[str, np.ndarray]:
    """Two linears that share x; the second one's values are all positive, which moves its zero points to the edge."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((24, k)).astype(np.float32) * 0.05
    return {"q": q, "k": np.abs(rng.standard_normal((8, k)).astype(np.float32)) * 0.05}


def tokens(k: int = K) -> np.ndarray:
    """Values that float16 holds, a row of zeros, and a row that is 100 times larger."""
    x = np.random.default_rng(1).standard_normal((2, 40, k)).astype(np.float16).astype(np.float32)
    x[0, 1] = 0
    x[1, 2] *= 64
    return x


def table(
    w: dict[str, np.ndarray], bits: int, group: int, *, symmetric: bool, int8: bool = False, dtype: np.dtype = FLOAT16
) -> dict[str, QuantTensor]:
    def tensor(path: str, rows: np.ndarray) -> QuantTensor:
        size = rows.shape[1] if group == -1 else group
        source = InstantQuant(path, InMemory(rows), bits, size, symmetric, dtype)
        return QuantTensor(
            path, source, rows.shape, bits, size, symmetric, dtype, activations="int8" if int8 else "float"
        )

    return {path: tensor(path, rows) for path, rows in w.items()}


def canonical(w: dict[str, np.ndarray], quant: dict[str, QuantTensor]) -> gs.Graph:
    return run(linear_graph(w), (InsertDequantize(quant), QuantizeActivations()), PassLog())


def lower(graph: gs.Graph, dtype: np.dtype, log: PassLog | None = None) -> gs.Graph:
    log = log or PassLog()
    run(graph, cast_compute_type(dtype), log)
    run(graph, [LowerNativeWeightOnly(dtype), LowerNativeInt8(dtype, wide=True)], log)
    return graph


@pytest.mark.parametrize("group", [-1, 64])
def test_a_product_and_what_corrects_it_are_evaluated_of_one_reading(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()

    def counted(self: InMemory) -> Iterator[Tile]:
        read.append("tile")
        yield Tile(0, (self.array,))

    w = {"q": weights()["q"]}
    graph = lower(canonical(w, table(w, 8, group, symmetric=False)), BFLOAT16)
    monkeypatch.setattr(InMemory, "tiles", counted)
    y = Evaluation(graph, {"x": tokens()}).take(graph.outputs[0].name)
    assert len(read) == 1
    again = Evaluation(graph, {"x": tokens()}).take(graph.outputs[0].name)  # nothing of the first run is left
    assert len(read) == 2
    np.testing.assert_array_equal(y, again)


@pytest.mark.parametrize(("bits", "group", "int8"), [(8, 64, False), (4, 32, False), (4, 64, False), (8, -1, True)])
def test_each_form_of_a_weight_streams(bits: int, group: int, int8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with their scales apart, and codes with one scale for all."""
    w = {"q": weights()["q"]}
    graph = lower(canonical(w, table(w, bits, group, symmetric=True, int8=int8)), BFLOAT16)
    feeds = {"x": tokens()}
    plain = Evaluation(graph, feeds).take(graph.outputs[0].name)
    run(graph, [ExplicitScales()], PassLog())
    load = View.load
    monkeypatch.setattr(View, "load", lambda self: load(self) if len(self.shape) == 1 else pytest.fail("a matrix"))
    apart = Evaluation(graph, feeds).take(graph.outputs[0].name).astype(np.float32)
    assert np.linalg.norm(apart - plain.astype(np.float32)) < 0.01 * np.linalg.norm(plain.astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
def test_two_products_of_one_weight_have_codes_of_their_own(bits: int) -> None:
    """As a module that is called twice has them."""
    w = {"q": weights()["q"]}
    graph = linear_graph(w)
    again = graph.nodes[0].inputs[1]
    graph.outputs.append(gs.Variable("y.again", FLOAT32, graph.outputs[0].shape))
    graph.nodes.append(gs.Node("MatMul", "q#2", {}, [graph.inputs[0], again], graph.outputs[1:]))
    quant = table(w, bits, -1, symmetric=False)
    lowered = lower(run(graph, (InsertDequantize(quant), QuantizeActivations()), PassLog()), FLOAT16)
    codes = [node.inputs[0].name for node in lowered.nodes if node.op == "DequantizeLinear"]
    assert sorted(codes) == ["q#2/codes", "q/codes"]
    first, second = outputs(lowered, tokens())
    np.testing.assert_array_equal(first, second)


def outputs(graph: gs.Graph, x: np.ndarray) -> list[np.ndarray]:
    run_of = Evaluation(graph, {"x": x}, [t.name for t in graph.outputs])
    return [run_of.peek(t.name).astype(np.float32) for t in graph.outputs]


def worst_channel(got: np.ndarray, want: np.ndarray) -> float:
    """The largest relative error of an output channel."""
    error = np.linalg.norm((got - want).reshape(-1, want.shape[-1]), axis=0)
    return float((error / np.linalg.norm(want.reshape(-1, want.shape[-1]), axis=0)).max())


def unit(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).eps) / 2


MODES = {
    "a16w8": (8, -1, False, False),
    "a16w8-symmetric": (8, -1, True, False),
    "a16w8-group": (8, 64, False, False),
    "a16w4": (4, 64, False, False),
    "a16w4-symmetric": (4, 64, True, False),
    "a16w4-channel": (4, -1, False, False),
    "a8w8": (8, -1, True, True),
    "a8w8-asymmetric": (8, -1, False, True),
}


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_lowered_is_the_twin_but_for_rounding(mode: str, dtype: np.dtype, tmp_path: Path) -> None:
    bits, group, symmetric, int8 = MODES[mode]
    w, x = weights(), tokens()
    if dtype == BFLOAT16:
        x = x.astype(BFLOAT16).astype(np.float32)
    twin = canonical(w, table(w, bits, group, symmetric=symmetric, int8=int8, dtype=dtype))
    want = evaluate(twin.copy(), {"x": x}, tmp_path)
    lowered = lower(twin, dtype)
    verify(lowered, Stage.TENSORRT)
    for got, expected in zip(outputs(lowered, x), want, strict=True):
        assert worst_channel(got, expected) < BOUND * unit(dtype)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("mode", ["a16w8", "a16w8-group", "a16w4", "a16w4-channel", "a8w8-asymmetric"])
def test_a_mean_of_the_inputs_costs_nothing(mode: str, dtype: np.dtype, tmp_path: Path) -> None:
    """Of eight deviations, which a zero point would meet in 16 bits; behind a GELU it is smaller, and K larger."""
    bits, group, symmetric, int8 = MODES[mode]
    w, x = weights(), (tokens() + 8).astype(dtype).astype(np.float32)
    twin = canonical(w, table(w, bits, group, symmetric=symmetric, int8=int8, dtype=dtype))
    want = evaluate(twin.copy(), {"x": x}, tmp_path)
    for got, expected in zip(outputs(lower(twin, dtype), x), want, strict=True):
        assert worst_channel(got, expected) < BOUND * unit(dtype)


@pytest.mark.parametrize("mode", ["a16w8", "a16w4", "a8w8"])
def test_one_scale_off_by_a_percent_is_seen(mode: str, tmp_path: Path) -> None:
    bits, group, symmetric, int8 = MODES[mode]
    w, x = {"q": weights()["q"]}, tokens()
    quant = table(w, bits, group, symmetric=symmetric, int8=int8)
    want = evaluate(canonical(w, quant), {"x": x}, tmp_path)
    (tile,) = quant["q"].tiles()
    scale = tile.parts[1].copy()
    scale[0, 0] *= 1.01
    replace_source(quant["q"], Codes(tile.parts[0], scale, tile.parts[2]))
    got = outputs(lower(canonical(w, quant), FLOAT16), x)
    assert worst_channel(got[0], want[0]) > BOUND * unit(FLOAT16)


@dataclass(frozen=True, eq=False)
class Stored:
    """Codes that are already there."""

    codes: Codes

    def tiles(self) -> Iterator[Tile]:
        yield Tile(0, self.codes)


def replace_source(quant: QuantTensor, codes: Codes) -> None:
    object.__setattr__(quant, "source", Stored(codes))


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_a_symmetric_weight_has_no_correction() -> None:
    w = weights()
    lowered = lower(canonical(w, table(w, 4, 64, symmetric=True)), FLOAT16)
    assert ops(lowered).count("MatMul") == len(w)
    assert "ReduceMean" not in ops(lowered)


def test_linears_that_share_an_input_share_its_means_and_its_codes() -> None:
    w = weights()
    means = lower(canonical(w, table(w, 4, 64, symmetric=False)), FLOAT16)
    assert [ops(means).count(op) for op in ("ReduceMean", "Sub")] == [2, 1]  # of a token; of what it leaves, by group
    codes = lower(canonical(w, table(w, 8, -1, symmetric=True, int8=True)), FLOAT16)
    assert ops(codes).count("QuantizeLinear") == 1


def test_int4_by_channel_is_written_in_blocks_with_repeated_scales() -> None:
    w = weights()
    lowered = lower(canonical(w, table(w, 4, -1, symmetric=True)), FLOAT16)
    dq = next(n for n in lowered.nodes if n.name == "q/weight")
    assert dq.attrs == {"axis": 0, "block_size": 128}
    scale = view_of(dq.inputs[1]).load()
    assert scale.shape == (2, 24)
    assert (scale[0] == scale[1]).all()


def test_no_weight_is_loaded_by_a_lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights()
    twin = canonical(w, table(w, 4, 64, symmetric=False))
    monkeypatch.setattr("instantrt.passes.core.lazy.View.load", lambda view: pytest.fail(f"loaded {view.shape}"))
    lower(twin, FLOAT16)


def test_group_wise_a8w8_is_rejected_with_the_reason() -> None:
    w, log = weights(), PassLog()
    lower(canonical(w, table(w, 8, 64, symmetric=True, int8=True)), FLOAT16, log)
    reasons = [e.reason for e in log.rejected() if isinstance(e.by, LowerNativeInt8)]
    assert len(reasons) == len(w)
    assert all("by channel only" in reason for reason in reasons)


def test_sums_of_the_int8_product_stay_finite_where_unscaled_ones_would_not(tmp_path: Path) -> None:
    """The sum of codes' products exceeds float16's 65504 many times over."""
    w, x = {"q": np.ones((4, 4096), np.float32)}, np.ones((1, 2, 4096), np.float32)
    quant = table(w, 8, -1, symmetric=True, int8=True)
    (got,) = outputs(lower(canonical(w, quant), FLOAT16), x)
    (want,) = evaluate(canonical(w, quant), {"x": x}, tmp_path)
    assert 127 * 127 * 4096 > 65504
    assert worst_channel(got, want) < BOUND * unit(FLOAT16)


def test_a_scale_that_the_type_cannot_hold_is_an_error() -> None:
    w = weights()
    quant = table(w, 8, -1, symmetric=True)
    (tile,) = quant["q"].tiles()
    replace_source(quant["q"], Codes(tile.parts[0], tile.parts[1] * 1e-6, tile.parts[2]))
    lowered = lower(canonical(w, quant), FLOAT16)
    scale = next(n for n in lowered.nodes if n.name == "q/weight").inputs[1]
    with pytest.raises(UserError, match="a scale does not fit float16"):
        view_of(scale).load()


def test_float32_is_left_alone(tmp_path: Path) -> None:
    w, x = weights(), tokens()
    twin = canonical(w, table(w, 8, -1, symmetric=False))
    want = evaluate(twin.copy(), {"x": x}, tmp_path)
    for got, expected in zip(outputs(lower(twin, FLOAT32), x), want, strict=True):
        assert worst_channel(got, expected) < 1e-5


def test_a_zero_point_costs_little_room() -> None:
    """An asymmetric int4 weight [N, 256] in groups of 128 takes 5 % more: a correction a group, and a sum a channel."""

    def room(*, symmetric: bool) -> int:
        w = weights()
        graph = lower(canonical(w, table(w, 4, 128, symmetric=symmetric)), FLOAT16)
        views = (view_of(tensor) for tensor in graph.tensors().values())
        return sum(view.nbytes for view in views if view is not None)

    assert 1.03 < room(symmetric=False) / room(symmetric=True) < 1.05
