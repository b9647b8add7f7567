"""A lowering with one wrong pass: the bisection names that pass and the node where it went wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.bisect import BisectingLog, Culprit, bisect
from instantrt.passes.core.lazy import view_of
from instantrt.passes.core.rewrite import PassLog, Reject, Rewrite, run
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.lower_native_int8 import LowerNativeInt8
from tests.compiler.accuracy_models import FEEDS, K, constant, decisions, float_graph

FLOAT16 = np.dtype(np.float16)


@dataclass(frozen=True)
class WrongScale(Rewrite[gs.Node]):
    """One scale of one layer becomes 1 % too large."""

    path: str

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        return node if node.name == self.path and node.op == "MatMulIntegerToFloat" else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        scale = match.inputs[3]
        scale.values = np.array(scale.values)
        constant(graph, scale.name)[9] *= 1.01


@dataclass(frozen=True)
class LeakyRelu(Rewrite[gs.Node]):
    """An operator that is no linear layer turns into a similar one."""

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        return node if node.op == "Relu" and node.name == "second/Relu" else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:  # noqa: ARG002
        match.op, match.attrs["alpha"] = "LeakyRelu", 1e-3


def looking(canonical: gs.Graph) -> BisectingLog:
    return BisectingLog(canonical=canonical, feeds=FEEDS)


def twin() -> gs.Graph:
    graph = float_graph()
    return pipeline.quantize(graph.copy(), decisions(graph, 8, 64), PassLog())


@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [(WrongScale("first"), "first.product"), (WrongScale("second"), "second.product"), (LeakyRelu(), "second.relu")],
    ids=["first", "second", "between"],
)
def test_the_wrong_pass_and_its_first_wrong_node_are_named(wrong: Rewrite[gs.Node], tensor: str) -> None:
    canonical, good = twin(), linear_passes("exact")

    def lower(log: PassLog) -> gs.Graph:
        graph = canonical.copy()
        run(graph, good, log)
        run(graph, [wrong], log)
        return graph

    culprit = bisect(lower, looking(canonical))
    assert culprit is not None
    assert culprit.after == type(wrong).__name__
    assert culprit.tensor == tensor
    assert culprit.node in (tensor, "second/Relu")
    assert culprit.error > culprit.bound.layer


def test_a_right_lowering_has_no_culprit_and_a_wrong_file_has() -> None:
    canonical = twin()

    def lower(log: PassLog) -> gs.Graph:
        return run(canonical.copy(), linear_passes("exact"), log)

    assert bisect(lower, looking(canonical), lower(PassLog())) is None
    written = run(lower(PassLog()), [WrongScale("first")], PassLog())
    culprit = bisect(lower, looking(canonical), written)
    assert culprit is not None
    assert culprit.after == "writing the artifact"
    assert culprit.tensor.startswith("first.")


def test_the_last_token_alone_is_no_wrong_output() -> None:
    """An artifact gives its logits alone, where the twin has every token's."""
    canonical = twin()

    def lower(log: PassLog) -> gs.Graph:
        return run(canonical.copy(), linear_passes("exact"), log)

    written = lower(PassLog())
    (end,) = written.outputs
    every = gs.Variable("every", end.dtype, end.shape)
    end.inputs[0].outputs[0] = every
    bounds = [
        gs.Constant(name, np.array([value], np.int64)) for name, value in (("from", -1), ("to", 1 << 60), ("of", 1))
    ]
    written.nodes.append(gs.Node("Slice", "last", {}, [every, *bounds], [end]))
    end.shape = (end.shape[0], 1, end.shape[2])
    assert bisect(lower, looking(canonical), written) is None


def test_a_code_that_sixteen_bits_turn_is_no_error_and_a_wrong_scale_is() -> None:
    """The twin makes codes of float32, an engine of float16: near a tie they are others, and a step is many bounds."""
    graph = float_graph()
    canonical = pipeline.quantize(graph.copy(), decisions(graph, 8, K, "int8"), PassLog())
    loud = FEEDS["x"] * np.where(np.arange(K) == 5, np.float32(10), np.float32(1))
    factor = np.float32(1)

    def lower(log: PassLog) -> gs.Graph:
        lowered = run(canonical.copy(), cast_compute_type(FLOAT16), log)
        pipeline.lower_native(lowered, FLOAT16, PassLog(), wide=True)
        scales = next(node for node in lowered.nodes if node.name == "second/by_channel")
        scales.inputs[1] = gs.Constant("second.scales", view_of(scales.inputs[1]).load() * factor)
        log.passed(LowerNativeInt8(FLOAT16, wide=True), lowered, changed=True)
        return lowered

    def culprit() -> Culprit | None:
        return bisect(lower, BisectingLog(canonical=canonical, feeds={"x": loud}, dtype=FLOAT16, worst=False))

    assert culprit() is None
    factor = np.float32(1.01)
    found = culprit()
    assert found is not None
    assert found.tensor == "second.product"
    assert found.error == pytest.approx(0.01, rel=0.05)
