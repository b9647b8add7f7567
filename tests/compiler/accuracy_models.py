"""A model of two linears, small enough to break in every way in a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.layer_errors import Graphs, LayerErrors, measure_layers
from instantrt.compiler.quant import instant
from instantrt.compiler.quant.config import QuantConfig
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.lazy import Array, InMemory
from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.qdq.insert_qdq import Decisions

K = 64
FLOAT32 = np.dtype(np.float32)
RANDOM = np.random.default_rng(5)
WEIGHTS = {path: RANDOM.standard_normal((K, K)).astype(np.float32) for path in ("first", "second")}
BIASES = {path: RANDOM.standard_normal(K).astype(np.float32) for path in WEIGHTS}
FEEDS = {"x": RANDOM.standard_normal((2, 9, K)).astype(np.float32)}


def float_graph() -> gs.Graph:
    """x -> first -> Relu -> second -> y, each linear with a bias."""
    x, nodes = gs.Variable("x", FLOAT32, ["b", "s", K]), []
    tensor = x
    for path, w in WEIGHTS.items():
        product = gs.Variable(f"{path}.product", FLOAT32, ["b", "s", K])
        out = gs.Variable(f"{path}.out", FLOAT32, ["b", "s", K])
        nodes.append(gs.Node("MatMul", path, {}, [tensor, weight_constant(path, InMemory(w), w.shape)], [product]))
        nodes.append(gs.Node("Add", f"{path}/Add", {}, [product, gs.Constant(f"{path}.bias", BIASES[path])], [out]))
        tensor = gs.Variable(f"{path}.relu", FLOAT32, ["b", "s", K])
        nodes.append(gs.Node("Relu", f"{path}/Relu", {}, [out], [tensor]))
    return gs.Graph(nodes, [x], [tensor], opset=23)


def decisions(graph: gs.Graph, bits: int, group: int, activations: str = "float") -> Decisions:
    compute = "activate_quant" if activations == "int8" else "weight_only"
    config = QuantConfig(
        weight_format=f"{'int' if bits == 8 else 'uint'}{bits}", group_size=group, compute_method=compute
    )
    return {each.path: instant.instant(each, config, FLOAT32) for each in pipeline.linears(graph)}


def graphs(chosen: Callable[[gs.Graph], Decisions], preset: str = "exact") -> Graphs:
    """Float, twin, and what x86 makes of it, with every constant of the lowered graph at hand."""
    graph = float_graph()
    twin = pipeline.quantize(graph.copy(), chosen(graph), PassLog())
    request = Request(".", ("x86",), ".", cpu_preset=preset)  # type: ignore[arg-type]
    lowered = pipeline.lower_onnxruntime(twin.copy(), find_target("x86"), request, PassLog())
    for tensor in lowered.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor.values = np.array(tensor.values)
    return Graphs(canonical=twin, floating=graph, lowered=lowered)


def measured(graphs: Graphs, feeds: Mapping[str, Array] = FEEDS) -> LayerErrors:
    return measure_layers(graphs, feeds)


def constant(graph: gs.Graph, name: str) -> Array:
    """The values of a constant, to be changed in place."""
    values: Array = graph.tensors()[name].values
    return values
