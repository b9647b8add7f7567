"""Kernels of ours on CPUs in odd models and beside other artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from instantrt import load_artifact
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from tests.commands import invoke
from tests.conftest import TINY


@pytest.mark.parametrize(
    ("inner", "nodes"),
    [
        pytest.param("a", "a = MatMul(x, w) y = Add(a, x)", id="a residual"),
        pytest.param("a", "a = MatMul(x, w) y = Add(a, b)", id="a bias"),
        pytest.param("a", "a = MatMul(x, w) s = Sigmoid(a) y = Mul(a, s)", id="SiLU"),
        pytest.param("s", "a = MatMul(x, w) s = Sigmoid(a) y = Mul(a, s)", id="the sigmoid of SiLU"),
        pytest.param("a", "a = MatMul(x, w) y = Gelu(a)", id="GELU"),
        pytest.param("g", "a = MatMul(x, w) s = Sigmoid(a) g = Mul(a, s) u = MatMul(x, v) y = Mul(g, u)", id="a gate"),
    ],
)
def test_what_a_model_says_of_its_inside_stays(inner: str, nodes: str, tmp_path: Path, cpu_library: Path) -> None:
    """An output of the model that a product would otherwise have gone on from by itself."""
    head = '<ir_version: 10, opset_import: ["": 21]> one (float[n, 64] x) => (float[n, 64] y, '
    model = onnx.parser.parse_model(f"{head}float[n, 64] {inner}) {{ {nodes} }}")
    random = np.random.default_rng(0)
    for name, sizes in {"w": (64, 64), "v": (64, 64), "b": (64,)}.items():
        values = 0.2 * random.standard_normal(sizes).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "m.onnx")
    request = Request(tmp_path / "m.onnx", ("x86",), tmp_path / "out", quant="a16w8", plugin=cpu_library)
    compile_model(request)
    x = random.standard_normal((5, 64)).astype(np.float32)
    expected = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    loaded = load_artifact(tmp_path / "out")
    for got, wanted in zip(loaded.session.run(None, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())


def test_beside_a_target_without_kernels(tmp_path: Path, cpu_library: Path) -> None:
    """Each is held against a twin that went on with its own bits; and diff lowers each as it was."""
    targets, out = ("--target", "x86", "--target", "armv9"), tmp_path / "out"
    said = invoke("compile", TINY, *targets, "--quant", "a16w4", "--plugin", cpu_library, "-o", out)
    assert said.exit_code == 0
    assert "armv9: ran" in said.output
    assert "amplifies" not in said.output
    found = invoke("diff", out, "--model", TINY, "--bisect", "--target", "x86")
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("rest", [0.9, 0.5])
def test_a_library_that_is_cut_off(rest: float, tmp_path: Path, cpu_library: Path) -> None:
    code = cpu_library.read_bytes()
    (tmp_path / "half.so").write_bytes(code[: int(rest * len(code))])
    with pytest.raises(UserError, match="a plugin library that is cut off") as caught:
        Request(TINY, ("x86",), tmp_path, quant="a16w4", plugin=tmp_path / "half.so")
    assert caught.value.expected == f"{len(code):,} bytes"


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plugin library here"):
        Request(TINY, ("x86",), tmp_path, quant="a16w4", plugin=tmp_path / "missing.so")
