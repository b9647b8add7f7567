"""Every GELU of transformers, as torch exports it: whole where it is one, and right in each artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from transformers.activations import ACT2FN

from instantrt.compiler.compile import compile_model
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.passes.core.evaluate import Evaluation
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, NONE
from tests.conftest import planned_and_written, plugin_library
from tests.graphs import relative

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


NAMES = sorted(set(WHOLE) | NO_GELU)


class Branches(torch.nn.Module):
    """For each activation a linear, the activation, a linear, all of one input: exported at once."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        branches = [(torch.nn.Linear(WIDTH, WIDTH), ACT2FN[name], torch.nn.Linear(WIDTH, WIDTH)) for name in names]
        self.branches = torch.nn.ModuleList(torch.nn.Sequential(*layers) for layers in branches)
        with torch.no_grad():
            for first, *_ in branches:
                first.weight *= 6  # to where the activations differ, and beyond where one clips

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [branch(x) for branch in self.branches]


def outputs(names: Sequence[str]) -> list[str]:
    """The branches' outputs: not the bare names, which torch's exporter gives to tensors inside."""
    return [f"y_{name}" for name in names]


def export(names: Sequence[str], path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Branches of `names` in `path`; an input, and what torch makes of it."""
    model = Branches(names).eval()
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        want = {name: y.numpy() for name, y in zip(names, model(x), strict=True)}
    torch.onnx.export(
        model, (x,), path, input_names=["x"], output_names=outputs(names), opset_version=23, dynamo=True, verbose=False
    )
    return x.numpy(), want


@dataclass(frozen=True)
class Compiled:
    x: np.ndarray
    want: dict[str, np.ndarray]
    got: dict[str, np.ndarray]  # of the artifact for x86
    floating: gs.Graph
    lowered: gs.Graph  # with the plugin's operators


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder = tmp_path_factory.mktemp("activations")
    x, want = export(NAMES, folder / "m.onnx")
    planned = planned_and_written(Request(folder / "m.onnx", ("x86",), folder / "out", quant="none"))
    got = ort.InferenceSession(folder / "out/x86/model.onnx").run(outputs(NAMES), {"x": x})
    request = Request(folder / "m.onnx", ("sm89",), folder, quant="a16w8", plugin=plugin_library(folder), builder="kit")
    return Compiled(x, want, dict(zip(NAMES, got, strict=True)), planned.model.graph, plan(request).lowered["sm89"])


def behind(graph: gs.Graph, output: str) -> list[gs.Node]:
    """The nodes that an output is made by, the last one first."""
    (tensor,) = (t for t in graph.outputs if t.name == output)
    found = list(tensor.inputs)
    for node in found:
        found += [made for t in node.inputs for made in t.inputs if made not in found]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_activation_of_transformers(name: str, compiled: Compiled) -> None:
    assert relative(compiled.got[name], compiled.want[name]) < 1e-5
    gelus = [node.attrs["approximate"] for node in behind(compiled.floating, f"y_{name}") if node.op == "Gelu"]
    assert gelus == [WHOLE[name][0] for _ in range(name in WHOLE)]

    made = [node for node in behind(compiled.lowered, f"y_{name}") if node.op == OP.name]
    assert [node.attrs["activation"] for node in made] == [NONE, WHOLE.get(name, (None, NONE))[1]]
    assert relative(Evaluation(compiled.lowered, {"x": compiled.x}).take(f"y_{name}"), compiled.want[name]) < 1e-2


@pytest.mark.slow
def test_an_engine_of_quick_gelu_builds(tmp_path: Path) -> None:
    export(["quick_gelu"], tmp_path / "m.onnx")
    compile_model(Request(tmp_path / "m.onnx", ("sm89",), tmp_path / "out", quant="a16w8", builder="tensorrt-rtx"))
    assert (tmp_path / "out/sm89/model.engine").is_file()
