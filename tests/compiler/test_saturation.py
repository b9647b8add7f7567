"""CPUs that sum 8-bit products with saturation: which artifacts cannot run there, and who says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest

from instantrt.compiler.compile import compile_model
from instantrt.compiler.llm import load_artifact
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime import onnx_engine, saturation
from instantrt.passes.core.errors import UserError
from tests.graphs import model_file

TEXT = """<ir_version: 8, opset_import: ["": 13]>
p (uint8[1,64] a, int8[64,1] b) => (int32[1,1] y) { y = MatMulInteger(a, b) }"""


def artifact(folder: Path, target: str, quant: str) -> Path:
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = model_file(folder / "model.onnx", "y = MatMul(x, w)", {"w": w})
    compile_model(Request(model, (target,), folder / "out", quant=quant))
    return folder / "out"


def test_the_probe_is_a_product_of_largest_values() -> None:
    assert onnx.parser.parse_model(TEXT).SerializeToString() == saturation.PROBE
    ort.InferenceSession(saturation.PROBE, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("target", "quant", "needs"),
    [("x86", "a8w8", True), ("x86", "a16w8", False), ("x86-avx2", "a8w8", False)],
)
def test_an_artifact_says_what_it_needs_and_is_refused_where_that_is_not(
    target: str, quant: str, needs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = artifact(tmp_path, target, quant)
    monkeypatch.setattr(saturation, "saturates", lambda: True)  # this machine's CPU may have VNNI
    monkeypatch.setattr(onnx_engine, "SESSIONS", {})
    if not needs:
        load_artifact(out)
        return
    with pytest.raises(UserError, match="--target x86-avx2"):
        load_artifact(out)
