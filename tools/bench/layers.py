"""Linear layers of random weights in every mode, for benchmarks of what becomes of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from safetensors.numpy import save_file

from instantrt.compiler.checkpoint import read_header
from instantrt.passes.core.lazy import FileTensor
from instantrt.passes.core.linear import linear, weight_constant
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.float.scaled import ScaledColumns
from instantrt.passes.ort.linear import linear_passes
from instantrt.passes.qdq.insert_qdq import InsertDequantize
from instantrt.passes.qdq.quantize_activations import QuantizeActivations

FLOAT32 = np.dtype(np.float32)

# name: bits, group size (0 is per channel), activations, CPU preset, have columns the factors of a norm
MODES: dict[str, tuple[int, int, str, str, bool]] = {
    "A16W8 per-channel": (8, 0, "float", "exact", False),
    "A16W8 per-channel, fast": (8, 0, "float", "fast", False),
    "A16W8 per-channel, fast, norms folded": (8, 0, "float", "fast", True),
    "A16W8 g128": (8, 128, "float", "exact", False),
    "A16W8 g128, fast": (8, 128, "float", "fast", False),
    "A16W8 g32, fast": (8, 32, "float", "fast", False),
    "A8W8 per-channel": (8, 0, "int8", "exact", False),
    "A16W4 g32": (4, 32, "float", "exact", False),
    "A16W4 g32, fast": (4, 32, "float", "fast", False),
    "A16W4 g32, fast, norms folded": (4, 32, "float", "fast", True),
    "A16W4 g128, fast": (4, 128, "float", "fast", False),
}


def write_weights(folder: Path, shapes: list[tuple[int, int]]) -> dict[str, FileTensor]:
    """A bf16 checkpoint of random weights."""
    random = np.random.default_rng(0)
    weights = {
        f"l{i}.weight": (random.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for i, shape in enumerate(shapes)
    }
    save_file(weights, folder / "model.safetensors")
    return read_header(folder / "model.safetensors")


def layer_chain(tensors: Mapping[str, FileTensor]) -> gs.Graph:
    """x -> every layer in turn -> y, in FLOAT normal form."""
    first = next(iter(tensors.values()))
    x = gs.Variable("x", FLOAT32, ["b", "s", first.shape[1]])
    nodes, value = [], x
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        n, k = tensor.shape
        out = gs.Variable(f"y.{path}", FLOAT32, ["b", "s", n])
        nodes.append(gs.Node("MatMul", path, {}, [value, weight_constant(path, tensor, (n, k))], [out]))
        value = out
    return gs.Graph(nodes, [x], [value], opset=23, ir_version=10)


def lowered(tensors: Mapping[str, FileTensor], mode: str) -> gs.Graph:
    bits, group, activations, preset, folded = MODES[mode]
    graph, table = layer_chain(tensors), {}
    for node in graph.nodes:
        found = linear(node)
        assert found is not None
        size, symmetric = group or found.shape[1], activations == "int8"
        factors = np.where(np.arange(found.shape[1]) % 64, 1, 8).astype(FLOAT32)
        rows = ScaledColumns(found.rows, factors.tobytes()) if folded else found.rows
        source = InstantQuant(found.path, rows, bits, size, symmetric, FLOAT32)
        table[found.path] = QuantTensor(
            found.path, source, found.shape, bits, size, symmetric, FLOAT32, "int8" if symmetric else "float"
        )
    run(graph, (InsertDequantize(table), QuantizeActivations()), PassLog())
    return run(graph, linear_passes(preset), PassLog())  # type: ignore[arg-type]


def peak_kb() -> int:
    """This program's peak resident memory (Linux); getrusage would also count the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
