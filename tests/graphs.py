"""Small graphs and how they are run, for tests of passes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.compiler.accuracy.runners import session
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.passes.core.lazy import InMemory
from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.quant import Activations, InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.qdq.insert_qdq import InsertDequantize
from instantrt.passes.qdq.quantize_activations import QuantizeActivations

FLOAT32 = np.dtype(np.float32)


K = 256


def weights(k: int = K) -> dict[str, np.ndarray]:
    """Of three linears [n, k] with long tails, off the middle."""
    rng = np.random.default_rng(0)
    shapes = {"q": 64, "k": 34, "v": 7}
    return {p: (rng.standard_t(5, (n, k)) * 0.02 + 0.003).astype(np.float32) for p, n in shapes.items()}


def tokens(k: int = K) -> np.ndarray:
    """Ordinary rows, a row of zeros, a row 50 times larger, channels 30 times larger: what breaks int8 activations."""
    x = np.random.default_rng(1).standard_normal((2, 5, k)).astype(np.float32)
    x[0, 1] = 0
    x[1, 2] *= 50
    x[..., ::97] *= 30
    return x


def per_row(got: np.ndarray, want: np.ndarray) -> float:
    """The worst relative error of a row; zero rows must be zero."""
    norm = np.linalg.norm(want, axis=-1)
    error = np.linalg.norm(got - want, axis=-1)
    assert (error[norm == 0] == 0).all()
    return float((error[norm > 0] / norm[norm > 0]).max())


def linear_graph(weights: Mapping[str, np.ndarray], *, share_input: bool = True) -> gs.Graph:
    """One MatMul in normal form for each W [N, K]; x [b, s, K] -> y.<path>."""
    k = next(iter(weights.values())).shape[1]
    x = gs.Variable("x", FLOAT32, ["b", "s", k])
    nodes, inputs, outputs = [], [x] if share_input else [], []
    for path, w in weights.items():
        source = x if share_input else gs.Variable(f"x.{path}", FLOAT32, ["b", "s", w.shape[1]])
        if not share_input:
            inputs.append(source)
        y = gs.Variable(f"y.{path}", FLOAT32, ["b", "s", w.shape[0]])
        nodes.append(gs.Node("MatMul", path, {}, [source, weight_constant(path, InMemory(w), w.shape)], [y]))
        outputs.append(y)
    return gs.Graph(nodes, inputs, outputs, opset=23, ir_version=10)


def quantize(
    graph: gs.Graph,
    weights: Mapping[str, np.ndarray],
    *,
    bits: int,
    group_size: int = -1,
    activations: Activations = "float",
    log: PassLog | None = None,
) -> gs.Graph:
    """The canonical Q/DQ form of `graph` with InstantQuant parameters."""
    table = {}
    for path, w in weights.items():
        group, symmetric = (w.shape[1] if group_size == -1 else group_size), activations == "int8"
        source = InstantQuant(path, InMemory(w), bits, group, symmetric, FLOAT32)
        table[path] = QuantTensor(path, source, w.shape, bits, group, symmetric, FLOAT32, activations)
    return run(graph, (InsertDequantize(table), QuantizeActivations()), log or PassLog())


def evaluate(graph: gs.Graph, feeds: Mapping[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    """Runs a graph on ONNX Runtime as it is: no fusion of Q/DQ into other kernels."""
    write_model(graph, folder / "model.onnx")
    outputs: list[np.ndarray] = session(folder / "model.onnx", as_written=True).run(None, dict(feeds))
    return outputs


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want|, Frobenius; infinite where anything is not finite."""
    error = float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
    return error if np.isfinite(got).all() else float("inf")


def model_file(path: Path, nodes: str, weights: Mapping[str, np.ndarray], opset: int = 21, kind: str = "float") -> Path:
    """x [b, 64] -> `nodes`, in ONNX's text syntax -> y [b, 64] as an .onnx file whose inputs and outputs are `kind`."""
    head = f'<ir_version: 10, opset_import: ["": {opset}]> g ({kind}[b, 64] x) => ({kind}[b, 64] y)'
    model = onnx.parser.parse_model(f"{head} {{ {nodes} }}")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    onnx.save(model, path)
    return path


def compiled_error(model: Path, quant: str, out: Path) -> float:
    """How far the x86 artifact of a model_file is from the file, both on ONNX Runtime."""
    compile_model(Request(model, ("x86",), out, quant=quant))
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)}
    want, got = (session(path).run(None, feeds)[0] for path in (model, out / "x86/model.onnx"))
    return relative(got, want)


def first_output(path: Path, feeds: Mapping[str, Any]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: np.ndarray = model.run(None, dict(feeds))[0]
    return output
