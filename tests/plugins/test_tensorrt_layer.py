"""The TensorRT layer, from one source, in the real registries of TensorRT 10, 11 and RTX, without a GPU.

The plugin library under test holds the emulated kernels, so even `enqueue` runs. Headers are looked for in
TENSORRT_ROOT_10 and TENSORRT_ROOT_11 (unpacked `include/` folders of the public TensorRT repository), else in
.third_party/tensorrt-v10.16 and -v11.1; registries in the lean wheels, installed or unpacked under .third_party.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from plugins import ops
from plugins.weight_only_gemm.op import OP
from plugins.weight_only_gemm.semantics import SILU
from tests.plugins.cases import Case
from tests.plugins.kernels import ROOT, Emulated

HOST = Path(__file__).with_name("tensorrt_host.cpp")
THIRD_PARTY = ROOT / ".third_party"
HEADERS = {"10": "tensorrt-v10.16", "11": "tensorrt-v11.1"}


def headers(major: str) -> Path:
    root = Path(os.environ.get(f"TENSORRT_ROOT_{major}", THIRD_PARTY / HEADERS[major]))
    if not (root / "include" / "NvInferRuntime.h").exists():
        pytest.skip(f"no TensorRT {major} headers: set TENSORRT_ROOT_{major} to a folder that holds include/")
    return root / "include"


def cuda_headers() -> Path:
    found = [Path("/usr/local/cuda/include")]
    if nvcc := shutil.which("nvcc"):
        found.insert(0, Path(nvcc).resolve().parents[1] / "include")
    if wheels := importlib.util.find_spec("nvidia.cu13") if importlib.util.find_spec("nvidia") else None:
        found += [Path(p) / "include" for p in wheels.submodule_search_locations or ()]
    for folder in found:
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    pytest.skip("no CUDA headers: install nvidia-cuda-runtime or a CUDA toolkit")


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt_layer")


@pytest.fixture(scope="session")
def plugin(folder: Path, emulated: dict[int, Emulated]) -> dict[str, Path]:
    """The plugin library built against each header set that is here; kernels come from the emulator library."""
    kernels = emulated[80].library.path
    libraries = {}
    for major in HEADERS:
        try:
            include = headers(major)
        except pytest.skip.Exception:
            continue
        libraries[major] = folder / f"plugin{major}.so"
        compile_cpp(ROOT / "plugins/weight_only_gemm/plugin.cpp", libraries[major], include, "-shared", str(kernels))
    return libraries


def compile_cpp(source: Path, out: Path, include: Path, *options: str) -> None:
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    system = ["-isystem", str(include), "-isystem", str(cuda_headers())]
    subprocess.run([*command, *system, str(source), "-o", str(out), *options, "-ldl"], check=True)


@pytest.mark.parametrize("built_with", ["10", "11"])
@pytest.mark.parametrize("host", ["none", "10", "11", "rtx"])
def test_plugin_in_a_registry(
    folder: Path, plugin: dict[str, Path], emulated: dict[int, Emulated], host: str, built_with: str
) -> None:
    """Either build of the plugin works under every TensorRT; only the host must match its own registry's major."""
    major = "10" if host == "10" else "11"  # RTX has the registry of TensorRT 11
    include = headers(major)
    headers(built_with)
    where = "-" if host == "none" else str(registry(host))
    program = folder / f"host{major}"
    if not program.exists():
        compile_cpp(HOST, program, include)
    case = Case(9, 96, 128, bits=4, group=32, bias=True, activation=SILU, gated=1).make()
    for name in ("x", "codes", "affine", "bias"):
        (folder / f"{name}.bin").write_bytes(getattr(case, name).tobytes())
    (folder / "y.bin").unlink(missing_ok=True)
    command = [str(program), str(plugin[built_with]), where, "9", "96", "128", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    said = result.stdout.splitlines()
    assert result.returncode == 0, result.stdout + result.stderr
    assert said[-1] == "done"
    assert [line.split()[1] for line in said if line.startswith("field ")] == [a.name for a in OP.attrs]
    assert f"core {ops.DOMAIN} {OP.name} {OP.version}" in said
    assert "shape 3 1 9 48" in said
    serialized = {line.split()[1]: int(line.split()[2]) for line in said if line.startswith("serialized ")}
    assert serialized == OP.attributes({"bits": 4, "group": 32, "activation": SILU, "gated": 1})
    y = np.frombuffer((folder / "y.bin").read_bytes(), np.float16).reshape(9, 48)
    assert np.array_equal(y, emulated[80].run(case, sm_count=4))
    assert "'codes' axis 2 is 513, expected 512" in result.stderr, "refusals say where, what was expected and found"


def test_the_library_links_nothing_of_tensorrt(plugin: dict[str, Path]) -> None:
    for library in plugin.values() or [pytest.skip("no TensorRT headers")]:
        needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        assert not [
            line for line in needed.splitlines() if "NEEDED" in line and ("libnvinfer" in line or "_rtx" in line)
        ]
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
        )
        exported = {line.split()[-1] for line in symbols.stdout.splitlines() if " T " in line}
        assert exported == {"getCreators", "setLoggerFinder"}


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


def build_on_rtx(folder: Path, library: Path, attrs: dict[str, int], n: int = 8192) -> subprocess.CompletedProcess[str]:
    """The real parser and builder of TensorRT-RTX, in their own process: its wheel lacks the name its parser opens."""
    real = registry("rtx")
    alias = folder / "alias"
    alias.mkdir(exist_ok=True)
    if not (alias / "libtensorrt_rtx.so").exists():
        (alias / "libtensorrt_rtx.so").symlink_to(real)
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


def test_rtx_builds_an_engine_that_contains_the_plugin(folder: Path, plugin: dict[str, Path]) -> None:
    headers("11")
    attrs = OP.attributes({"group": 32, "gated": 1})
    built = build_on_rtx(folder, plugin["11"], attrs)
    assert built.returncode == 0, built.stdout + built.stderr
    assert built.stdout.strip().endswith("[(-1, 4096)]")
    engine = (folder / "layer.plan").read_bytes()
    assert OP.name.encode() in engine
    packed = 8192 * 256 // 2
    assert packed < len(engine) < 2 * packed + 500_000, (
        "the engine holds the packed codes once, and nothing dequantized"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layout_version": 2}, "'layout_version' is 2"), ({"group": 64}, "'affine' axis 0 is 8, expected 4")],
)
def test_rtx_reports_bad_nodes(folder: Path, plugin: dict[str, Path], change: dict[str, int], message: str) -> None:
    headers("11")
    built = build_on_rtx(folder, plugin["11"], {**OP.attributes({"group": 32, "gated": 1}), **change}, n=64)
    assert built.returncode == 1, "an error message, not a crash"
    assert message in built.stderr
