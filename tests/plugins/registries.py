"""TensorRT's headers and registries, as far as they are on this machine, and what is compiled against them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from instantrt.plugins import ops
from instantrt.plugins.weight_only_gemm.op import OP
from tests.plugins.cases import Case
from tests.plugins.kernels import ROOT, cuda_headers

HOST = Path(__file__).with_name("tensorrt_host.cpp")
THIRD_PARTY = ROOT / ".third_party"
HEADERS = {"10": "tensorrt-v10.16", "11": "tensorrt-v11.1"}


def headers(major: str) -> Path:
    root = Path(os.environ.get(f"TENSORRT_ROOT_{major}", THIRD_PARTY / HEADERS[major]))
    if not (root / "include" / "NvInferRuntime.h").exists():
        pytest.skip(f"no TensorRT {major} headers: set TENSORRT_ROOT_{major} to a folder that holds include/")
    return root / "include"


def registry(major: str) -> Path:
    """libnvinfer_lean.so.<major>, or TensorRT-RTX for 'rtx'."""
    name, package = f"libnvinfer_lean.so.{major}", "tensorrt_lean_libs"
    if major == "rtx":
        name, package = "libtensorrt_rtx.so.1", "tensorrt_rtx_libs"
    spec = importlib.util.find_spec(package)
    folders = [Path(p) for p in (spec.submodule_search_locations or ()) if spec] if spec else []
    for folder in [*folders, *THIRD_PARTY.glob(f"lean-{major}.*/{package}")]:
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"no {name}: install {'tensorrt-rtx' if major == 'rtx' else f'tensorrt-lean-cu13-libs {major}.x'}")


def compile_cpp(source: Path, out: Path, include: Path, *options: str) -> None:
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    system = ["-isystem", str(include), "-isystem", str(cuda_headers())]
    subprocess.run([*command, *system, str(source), "-o", str(out), *options, "-ldl"], check=True)


BUILD_ON_RTX = """
import sys
import tensorrt_rtx as trt
library, model, plan = sys.argv[1:]
log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network()
if not trt.get_plugin_registry().load_library(library):
    sys.exit("plugin library refused")
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file(model):
    sys.exit("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
config = builder.create_builder_config()
profile = builder.create_optimization_profile()
profile.set_shape("x", (1, 256), (8, 256), (64, 256))
config.add_optimization_profile(profile)
engine = builder.build_serialized_network(network, config)
if engine is None:
    sys.exit("no engine")
print([tuple(network.get_output(i).shape) for i in range(network.num_outputs)])
open(plan, "wb").write(engine)
"""


def rtx_alias(folder: Path) -> Path:
    """A folder for LD_LIBRARY_PATH that holds the name which RTX's parser opens."""
    alias = folder / "alias"
    alias.mkdir(exist_ok=True)
    if not (alias / "libtensorrt_rtx.so").exists():
        (alias / "libtensorrt_rtx.so").symlink_to(registry("rtx"))
    return alias


def build_on_rtx(folder: Path, library: Path, attrs: dict[str, int], n: int = 8192) -> subprocess.CompletedProcess[str]:
    """The real parser and builder of TensorRT-RTX, in their own process: its wheel lacks the name its parser opens."""
    alias = rtx_alias(folder)
    case = Case(1, n, 256, bits=4, group=32, bias=True).make()
    node = onnx.helper.make_node(
        OP.name, ["x", "codes", "affine", "bias"], ["y"], domain=ops.DOMAIN, name="layer",
        plugin_version=str(OP.version), plugin_namespace=ops.DOMAIN, **attrs,
    )  # fmt: skip
    f16 = onnx.TensorProto.FLOAT16
    weights = [onnx.numpy_helper.from_array(np.ascontiguousarray(getattr(case, i)), i) for i in node.input[1:]]
    graph = onnx.helper.make_graph(
        [node],
        "one_layer",
        [onnx.helper.make_tensor_value_info("x", f16, ["M", 256])],
        [onnx.helper.make_tensor_value_info("y", f16, ["M", n // 2])],
        weights,
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(ops.DOMAIN, 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "layer.onnx")
    command = [sys.executable, "-c", BUILD_ON_RTX, str(library), str(folder / "layer.onnx"), str(folder / "layer.plan")]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "LD_LIBRARY_PATH": str(alias)}
    )
