"""The fusion gate: how TensorRT-RTX reads each kind of quantized weight, for each SM it builds for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.build import Built, EngineSpec, build
from instantrt.compiler.backend.tensorrt.choose import quantized_linears
from instantrt.compiler.backend.tensorrt.fusion import Read, WeightRead, kernels, weight_reads
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits, profiles
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.lazy import InMemory
from instantrt.passes.core.quant import Activations, InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.qdq.insert_qdq import Decisions, InsertDequantize
from instantrt.passes.qdq.quantize_activations import QuantizeActivations
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from tests.conftest import TINY
from tests.graphs import linear_graph

K, N = 256, 64
FLOAT16 = np.dtype(np.float16)
FUSED, EXPANDED = Read.FUSED, Read.EXPANDED
#                      bits group symmetric int8 tokens
METHODS = {
    "a16w8": (8, K, False, False),
    "a16w8-symmetric": (8, K, True, False),
    "a16w8-group": (8, 64, True, False),
    "a16w4-channel": (4, K, False, False),
    "a16w4-group": (4, 64, False, False),
    "a16w4-symmetric": (4, 128, True, False),
    "a8w8": (8, K, True, True),
    "a8w8-asymmetric": (8, K, False, True),
}
TABLE = {
    #                   how it is read  as      times
    "a16w8":           (FUSED,         "Int8", "float"),
    "a16w8-symmetric": (FUSED,         "Int8", "float"),
    "a16w8-group":     (EXPANDED,      "Int8", "float"),
    "a16w4-channel":   (FUSED,         "Int4", "float"),
    "a16w4-group":     (FUSED,         "Int4", "float"),
    "a16w4-symmetric": (FUSED,         "Int4", "float"),
    "a8w8":            (FUSED,         "Int8", "Int8"),
    "a8w8-asymmetric": (FUSED,         "Int8", "Int8"),
}  # fmt: skip
# Turing has no int4, and there no kernel reads int8 weights beside float16 tokens.
TURING = {
    "a16w8":           (EXPANDED,      "Int8", "float"),
    "a16w8-symmetric": (EXPANDED,      "Int8", "float"),
    "a16w8-group":     (EXPANDED,      "Int8", "float"),
    "a8w8":            (FUSED,         "Int8", "Int8"),
    "a8w8-asymmetric": (FUSED,         "Int8", "Int8"),
}  # fmt: skip
PROFILES = tuple(
    {f"x.{name}": ((1, 1, K), (1, opt, K), (2, high, K)) for name in METHODS} for opt, high in ((16, 64), (1, 1))
)


def lowered(folder: Path, methods: list[str], *, wide: bool) -> tuple[Path, tuple[str, ...]]:
    """One model with a linear of each method, each with an input of its own."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((N, K)).astype(np.float32) for name in methods}
    table = {}
    for name, w in weights.items():
        bits, group, symmetric, int8 = METHODS[name]
        source = InstantQuant(name, InMemory(w), bits, group, symmetric, FLOAT16)
        activations = "int8" if int8 else "float"
        table[name] = QuantTensor(name, source, w.shape, bits, group, symmetric, FLOAT16, activations)  # type: ignore[arg-type]
    graph, log = linear_graph(weights, share_input=False), PassLog()
    run(graph, (InsertDequantize(table), QuantizeActivations()), log)
    pipeline.lower_native(run(graph, cast_compute_type(FLOAT16), log), FLOAT16, log, wide=wide)
    write_model(graph, folder / "model.onnx")
    return folder / "model.onnx", quantized_linears(graph)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [75, 80, 86, 89, 120, 121])
def test_how_each_weight_is_read(sm: int, tmp_path: Path) -> None:
    table = TURING if sm == 75 else TABLE
    onnx, linears = lowered(tmp_path, list(table), wide=sm > 75)
    assert sorted(linears) == sorted(table)
    ranges = tuple({name: r for name, r in p.items() if name[2:] in table} for p in PROFILES)
    spec = EngineSpec("tensorrt_rtx", onnx, tmp_path / "m.engine", tmp_path / "m.txt", ranges, (sm,))
    found = weight_reads(build(spec).layers.read_text("utf-8"), table)
    assert {c.linear: (c.read, c.dtype, c.tokens) for c in found} == table
    assert all(len(c.kernels) == len(ranges) for c in found)


def built(model: FloatModel, decisions: Decisions, folder: Path, **fields: Any) -> tuple[Built, gs.Graph]:
    """The example model in a real engine for one sequence, and the graph that it was built from."""
    limits, log = EngineLimits(max_batch=1, max_length=64, opt_length=16), PassLog()
    canonical = pipeline.quantize(model.graph.copy(), decisions, log)
    request = Request(TINY, ("sm89",), folder, **fields)
    graph = pipeline.lower_tensorrt(canonical, find_target("sm89"), FLOAT16, request, limits, log)
    write_model(graph, folder / "model.onnx")
    ranges = profiles(graph.inputs, limits, llm=True)
    spec = EngineSpec("tensorrt_rtx", folder / "model.onnx", folder / "m.engine", folder / "m.txt", ranges, (89,))
    return build(spec), graph


def read(made: Built, graph: gs.Graph) -> tuple[WeightRead, ...]:
    return weight_reads(made.layers.read_text("utf-8"), quantized_linears(graph))


def channels(model: FloatModel, activations: Activations) -> dict[str, QuantTensor]:
    """8 bits by channel for every linear of the example model."""
    symmetric, table = activations == "int8", {}
    for layer in pipeline.linears(model.graph):
        path, shape, k = layer.path, layer.shape, layer.shape[1]
        source = InstantQuant(path, layer.rows, 8, k, symmetric, FLOAT16)
        table[path] = QuantTensor(path, source, shape, 8, k, symmetric, FLOAT16, activations)
    return table


@pytest.mark.slow
def test_int8_weights_stay_int8_in_a_model_of_one_sequence(tiny_float: FloatModel, tmp_path: Path) -> None:
    """With a batch of exactly 1 the builder joins q, k and v where we have not, and expands their weights to do so."""
    decisions = channels(tiny_float, "float")
    del decisions["lm_head"]
    found = read(*built(tiny_float, decisions, tmp_path))
    assert len(found) == 4 * 4, "q, k and v are one product; gate and up another"
    assert {(c.read, c.dtype) for c in found} == {(FUSED, "Int8")}


@pytest.mark.slow
def test_int8_tokens_reach_the_head_too(tiny_float: FloatModel, tmp_path: Path) -> None:
    """The head sees the last token alone; the builder's process used to end over where it was cut off."""
    found = read(*built(tiny_float, channels(tiny_float, "int8"), tmp_path))
    assert "lm_head" in {c.linear for c in found}
    assert {(c.read, c.dtype, c.tokens) for c in found} == {(FUSED, "Int8", "Int8")}


@pytest.mark.slow
def test_an_int8_table_is_one_in_the_engine(tiny_float: FloatModel, tmp_path: Path) -> None:
    """4096 rows of 256 in one byte instead of two; a block of 128 has a scale and a zero point, 3 bytes."""
    stored, _ = built(tiny_float, {}, tmp_path)
    small, _ = built(tiny_float, {}, tmp_path, quant="none", embeddings="int8")
    assert stored.bytes - small.bytes == pytest.approx(4096 * (256 - 2 * 3), rel=0.05)
    readers = [k for k in kernels(small.layers.read_text("utf-8")) if "Int8" in k.constants]
    assert len(readers) == 2, "one kernel in each profile"
    assert all("Int64" in k.inputs and k.constants.count("Int8") == 2 for k in readers)


LINE = (
    "Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: x, Dimensions: [4,8], Datatype: {tokens} }}], Constants: "
    "[ {{ Name: c, Dimensions: [8,8], Datatype: {constant} }}], Outputs: [ {{ Name: y, Dimensions: [4,8], Datatype: "
    "Half }}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: l/weight][ONNX Layer: l]"
)


def line(name: str, kind: str, constant: str, tokens: str = "Half") -> str:
    return LINE.format(name=name, kind=kind, constant=constant, tokens=tokens)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([line("a", "gemm", "Int8", "Int8")], WeightRead("l", FUSED, "Int8", "Int8", ("a",))),
        (
            [line("a", "runtime_fusion", "Int4"), line("b", "kgen", "Int4")],
            WeightRead("l", EXPANDED, "Int4", "float", ("a", "b")),
        ),
        ([line("a", "gemm", "Half")], WeightRead("l", Read.FLOAT, kernels=("a",))),
        (
            [line("a", "gemm", "Int8").replace("[ONNX Layer: l/weight]", "[ONNX Layer: m/weight]")],
            WeightRead("l", FUSED, "Int8", "float", ("a",)),
        ),
        ([], WeightRead("l", Read.UNSEEN)),
    ],
    ids=["fused", "one profile expands", "folded to float", "joined with another", "absent"],
)
def test_the_verdict_is_that_of_the_worst_profile(lines: list[str], expected: WeightRead) -> None:
    table = "\n".join(["Layers:", *lines, "", "Bindings:"])
    assert len(kernels(table)) == len(lines)
    assert weight_reads(table, ["l"]) == (expected,)
