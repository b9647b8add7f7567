"""What `lacks` says of a node is what ONNX Runtime says when it loads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from instantrt.compiler.backend.kernels import lacks, refuse_lacking, with_kernels
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from tests.commands import refused
from tests.graphs import relative

IMAGE = "float[1, 2, 8, 8] x"
ONE_NODE: dict[str, str] = {
    "a kernel": f"({IMAGE}) => (float[1, 2, 8, 8] y) {{ y = Relu(x) }}",
    "a function": f"({IMAGE}) => (float[1, 2, 8, 8] y) {{ y = HardSwish(x) }}",
    "a function of what has none at 22": f"({IMAGE}) => (float[1, 2, 8, 8] y) {{ y = Bernoulli(x) }}",
    "only before 22": f"({IMAGE}) => (float[1, 2, 1, 1] y) {{ y = GlobalLpPool(x) }}",
    "a drawn number": f"({IMAGE}) => (float[1, 2, 8, 8] y) {{ y = RandomNormalLike(x) }}",
    "of another type": "(double[1, 1, 8, 8] x, double[1, 1, 3, 3] w) => (double[1, 1, 6, 6] y) { y = Conv(x, w) }",
    "of a type with a kernel": "(double[2, 8] x, double[8] w) => (double[2, 8] y) { y = LayerNormalization(x, w) }",
    "narrow floats, which it widens": "(float16[2, 8] x) => (float16[2, 8] y) { y = Softplus(x) }",
    "an operator of its own": "(float[2, 8] x, float[8] b) => (float[2, 8] y) { y = com.microsoft.BiasGelu(x, b) }",
    "its own, of a type without": "(double[8] x) => (double[8] y) { y = com.microsoft.QuickGelu(x) }",
    "nobody's": "(float[2, 8] x) => (float[2, 8] y) { y = com.microsoft.Nothing(x) }",
    "from opset 23 on": "(float[2, 8] x, float[8] w) => (float[2, 8] y) { y = RMSNormalization(x, w) }",
    "in a branch": f"""({IMAGE}, bool c) => (float[1, 2, 1, 1] y) {{
        y = If(c)<then_branch = t () => (float[1, 2, 1, 1] a) {{ a = GlobalLpPool(x) }},
                  else_branch = e () => (float[1, 2, 1, 1] b) {{ b = GlobalAveragePool(x) }}> }}""",
    "a type that follows from another": """(double[1, 1, 8, 8] x, double[1, 1, 3, 3] w) => (double[1, 1, 6, 6] y) {
        a = Abs(x) b = Neg(a) y = Conv(b, w) }""",
    "a type that a cast gives": """(float[1, 1, 8, 8] x, double[1, 1, 3, 3] w) => (double[1, 1, 6, 6] y) {
        a = Cast<to = 11>(x) y = Conv(a, w) }""",
}


def parsed(text: str, opset: int) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> g {text}')


def loads(model: onnx.ModelProto) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # its errors have no common class
        return False
    return True


@pytest.mark.parametrize("opset", [21, 22, 23])
@pytest.mark.parametrize("what", ONE_NODE)
def test_it_is_what_onnx_runtime_says(what: str, opset: int) -> None:
    model = parsed(ONE_NODE[what], opset)
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
    for node in graph.nodes:  # what our passes build has no types
        for tensor in node.outputs:
            tensor.dtype = tensor.dtype if tensor.name == "y" or node.op == "Cast" else None
    assert (not lacks(graph, opset)) == loads(model)


def test_a_graph_takes_the_newest_opset_that_has_all_of_its_kernels() -> None:
    graph = gs.import_onnx(parsed(ONE_NODE["only before 22"], 23))
    model = gs.export_onnx(with_kernels(graph))
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}
    assert loads(model)
    whole = gs.import_onnx(parsed(ONE_NODE["a function"], 23))
    assert with_kernels(whole).opset == 23


def test_the_refusal_names_nodes_types_and_a_way_out() -> None:
    with pytest.raises(UserError) as caught:
        refuse_lacking(gs.import_onnx(parsed(ONE_NODE["of another type"], 23)))
    said = str(caught.value)
    assert "y: Conv, version 22 for tensor(double)" in said
    assert "cast around Conv in the model: it has kernels for tensor(float)" in said


def values(path: Path, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    output: np.ndarray = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, dict(feeds))[0]
    return output


def test_a_model_whose_kernels_are_of_two_ages_runs(tmp_path: Path) -> None:
    """GlobalLpPool before 22, RMSNormalization from 23 on: the norm becomes what it is made of."""
    nodes = "a = GlobalLpPool(x) y = RMSNormalization(a, w)"
    text = f"(float[2, 4, 8, 8] x) => (float[2, 4, 1, 1] y) <float[1] w = {{2}}> {{ {nodes} }}"
    onnx.save(parsed(text, 23), tmp_path / "m.onnx")
    compile_model(Request(tmp_path / "m.onnx", ("x86",), tmp_path / "o"))
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    norm = np.sqrt((x**2).sum((2, 3), keepdims=True))
    assert relative(values(tmp_path / "o/x86/model.onnx", {"x": x}), 2 * norm / np.sqrt(norm**2 + 1e-5)) < 1e-6


def test_nothing_is_written_without_a_kernel(tmp_path: Path) -> None:
    onnx.save(parsed(ONE_NODE["of another type"], 23), tmp_path / "m.onnx")
    error = refused("compile", tmp_path / "m.onnx", "--target", "x86", "-o", tmp_path / "o")
    assert "no kernel" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
