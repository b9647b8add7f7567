"""Every GELU of transformers, as torch exports it: whole where it is one, and right in each artifact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from instantrt.compiler.compile import compile_model
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.passes.core.evaluate import Evaluation
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, NONE
from tests.conftest import planned_and_written
from tests.graphs import first_output, relative

WIDTH = 64
#                    the operator's attribute, the plugin's activation
WHOLE = {
    "gelu": ("none", GELU),
    "gelu_10": ("none", GELU),  # and a Clip
    "gelu_accurate": ("tanh", GELU_TANH),
    "gelu_fast": ("tanh", GELU_TANH),
    "gelu_new": ("tanh", GELU_TANH),
    "gelu_python": ("none", GELU),
    "gelu_python_tanh": ("tanh", GELU_TANH),
    "gelu_pytorch_tanh": ("tanh", GELU_TANH),
}
NO_GELU = {"quick_gelu"}  # x * sigmoid(1.702 * x)


def test_no_gelu_is_forgotten() -> None:
    assert {name for name in ACT2FN if "gelu" in name} == set(WHOLE) | NO_GELU


def export(name: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A linear, the activation, a linear, in `path`; an input, and what torch makes of it."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(WIDTH, WIDTH), ACT2FN[name], torch.nn.Linear(WIDTH, WIDTH)
    model = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        layers[0].weight *= 6  # to where the activations differ, and beyond where one clips
        x = torch.randn(3, 5, WIDTH)
        want = model(x).numpy()
    torch.onnx.export(model, (x,), path, input_names=["x"], opset_version=23, dynamo=True, verbose=False)
    return x.numpy(), want


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(WHOLE) | NO_GELU))
def test_an_activation_of_transformers(name: str, tmp_path: Path) -> None:
    x, want = export(name, tmp_path / "m.onnx")
    planned = planned_and_written(Request(tmp_path / "m.onnx", ("x86",), tmp_path / "out", quant="none"))
    assert relative(first_output(tmp_path / "out/x86/model.onnx", {"x": x}), want) < 1e-5
    gelus = [node.attrs["approximate"] for node in planned.model.graph.nodes if node.op == "Gelu"]
    assert gelus == [WHOLE[name][0] for _ in range(name in WHOLE)]

    request = Request(tmp_path / "m.onnx", ("sm89",), tmp_path, quant="a16w8", plugin=Path(__file__), builder="kit")
    lowered = plan(request).lowered["sm89"]
    made = [node for node in lowered.nodes if node.op == OP.name]
    assert [node.attrs["activation"] for node in made] == [WHOLE.get(name, (None, NONE))[1], NONE]
    assert relative(Evaluation(lowered, {"x": x}).take(lowered.outputs[0].name), want) < 1e-2


@pytest.mark.slow
def test_an_engine_of_quick_gelu_builds(tmp_path: Path) -> None:
    export("quick_gelu", tmp_path / "m.onnx")
    compile_model(Request(tmp_path / "m.onnx", ("sm89",), tmp_path / "out", quant="a16w8", builder="tensorrt-rtx"))
    assert (tmp_path / "out/sm89/model.engine").is_file()
