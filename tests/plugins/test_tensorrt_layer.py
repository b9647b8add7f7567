"""The TensorRT layer, from one source, in the real registries of TensorRT 10, 11 and RTX, without a GPU.

The plugin library under test holds the emulated kernels, so even `enqueue` runs. Headers are looked for in
TENSORRT_ROOT_10 and TENSORRT_ROOT_11 (unpacked `include/` folders of the public TensorRT repository), else in
.third_party/tensorrt-v10.16 and -v11.1; registries in the lean wheels, installed or unpacked under .third_party.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.artifact.manifest import find_artifact, read_manifest
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.backend.tensorrt.build import EngineSpec, build
from instantrt.compiler.backend.tensorrt.kit import read_kit, trtexec
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits, profiles
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.gemm.epilogues import EPILOGUES
from instantrt.passes.tensorrt.cast_compute_type import cast_compute_type
from instantrt.passes.tensorrt.lower_weight_only_gemm import LowerWeightOnlyGemm
from instantrt.plugins import ops
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import SILU
from tests.checkpoints import whole_checkpoint
from tests.conftest import TINY, planned_and_written
from tests.plugins.cases import Case
from tests.plugins.kernels import ROOT, Emulated
from tests.plugins.registries import HEADERS, HOST, build_on_rtx, compile_cpp, headers, registry, rtx_alias

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("major", ["10", "11"])
def test_a_host_that_only_opens_libraries(folder: Path, plugin: dict[str, Path], major: str) -> None:
    """As Triton does. The lean runtime stands in for libnvinfer.so under its name."""
    include, lean, place = headers(major), registry(major), folder / f"triton{major}"
    place.mkdir()
    shutil.copy(plugin[major], place / "libinstantrt_plugins.so")
    (place / "empty.c").write_text("")
    soname = f"libnvinfer.so.{major}"
    link = ["-Wl,--no-as-needed", f"-L{lean.parent}", f"-l:{lean.name}", f"-Wl,-rpath,{lean.parent}"]
    stand_in = ["gcc", "-shared", "-fPIC", str(place / "empty.c"), "-o", str(place / soname), f"-Wl,-soname,{soname}"]
    subprocess.run([*stand_in, *link], check=True)
    compile_cpp(ROOT / "plugins/runtime/register.cpp", place / "register.so", include, "-shared")
    compile_cpp(HOST.with_name("triton_host.cpp"), place / "host", include)
    result = subprocess.run(
        [str(place / "host"), str(place / soname), str(place / "register.so")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (result.stdout, result.stderr) == ("found\n", "")
    (place / "libinstantrt_plugins.so").unlink()
    alone = subprocess.run(
        [str(place / "host"), str(place / soname), str(place / "register.so")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert alone.stdout == "not found\n"
    assert "InstantRT: no getCreators in" in alone.stderr


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


def test_a_whole_model_with_the_plugin_builds_on_rtx(
    folder: Path, plugin: dict[str, Path], tiny_float: FloatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF model -> canonical Q/DQ -> WeightOnlyGemm -> written with streamed packing -> engine, no step of it mocked."""
    headers("11")
    f16 = np.dtype(np.float16)
    graph = tiny_float.graph.copy()
    decisions = {}
    for layer in pipeline.linears(graph):
        if "lm_head" not in layer.path:
            source = InstantQuant(layer.path, layer.rows, 4, 64, False, f16)
            decisions[layer.path] = QuantTensor(layer.path, source, layer.shape, 4, 64, False, f16)
    pipeline.quantize(graph, decisions, PassLog())
    twin = graph.copy()
    run(graph, cast_compute_type(f16), PassLog())
    run(graph, [LowerWeightOnlyGemm(f16), *EPILOGUES], PassLog())
    gemms = [node for node in graph.nodes if node.op == OP.name]
    assert len(decisions) == 4 * 7
    assert len(gemms) == 4 * 6, "gate and up are one"
    assert sum(node.attrs["gated"] for node in gemms) == 4
    assert sum(len(node.inputs) == 4 for node in gemms) == 4 * 3, "q, k and v have their biases"

    feeds = {t.name: np.zeros([s if isinstance(s, int) else 1 for s in t.shape], t.dtype) for t in graph.inputs}
    for name, value in {"input_ids": [[7, 11, 13]], "attention_mask": [[1, 1, 1]], "position_ids": [[0, 1, 2]]}.items():
        feeds[name] = np.array(value, np.int64)
    feeds = {n: v[:, :, :0] if n.startswith("past_key_values") else v for n, v in feeds.items()}
    narrow = Evaluation(graph, feeds).take("logits")
    wide = {n: v.astype(np.float32) if v.dtype == f16 else v for n, v in feeds.items()}
    exact = Evaluation(twin, wide).take("logits")
    assert np.linalg.norm(narrow - exact) <= 5e-3 * np.linalg.norm(exact), "float16 rounding through four layers"

    write_model(graph, folder / "tiny.onnx")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(rtx_alias(folder)))
    limits = EngineLimits(max_batch=1, max_length=64, opt_length=16)
    ranges = profiles(graph.inputs, limits, llm=True)
    spec = EngineSpec(
        "tensorrt_rtx",
        folder / "tiny.onnx",
        folder / "tiny.engine",
        folder / "tiny.json",
        ranges,
        (89,),
        (plugin["11"],),
    )
    built = build(spec)
    assert built.bytes > sum(quant.shape[0] * quant.shape[1] // 2 for quant in decisions.values())
    assert built.engine.read_bytes().count(OP.name.encode()) >= len(gemms)


@pytest.mark.parametrize("builder", ["tensorrt-rtx", "kit"])
def test_compile_puts_the_plugin_into_engines_and_kits(
    folder: Path, plugin: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builder: Any
) -> None:
    """`instantrt compile --plugin`: the library lies beside the artifact, and the manifest names it."""
    headers("11")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(rtx_alias(folder)))
    fields: dict[str, Any] = {"quant": "a16w4", "group_size": 32, "builder": builder, "plugin": plugin["11"]}
    compile_model(Request(TINY, ("sm89",), tmp_path, **fields))
    artifact = find_artifact(tmp_path)
    assert artifact.plugins == (f"sm89/{plugin['11'].name}",)
    assert (tmp_path / artifact.plugins[0]).read_bytes() == plugin["11"].read_bytes()
    if builder == "kit":
        assert OP.name.encode() in (tmp_path / "sm89/model.onnx").read_bytes()
        assert f"--dynamicPlugins={plugin['11'].name}" in trtexec(read_kit(tmp_path / "sm89").settings)
    else:
        assert (tmp_path / artifact.path).read_bytes().count(OP.name.encode()) >= 16


def test_int8_by_int4_engines_with_the_plugin(
    folder: Path, plugin: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A8W4, which TensorRT alone has not, from a GPTQ checkpoint; on Turing too, where TensorRT-RTX has no int4."""
    headers("11")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(rtx_alias(folder)))
    model = whole_checkpoint("gptq-int4-g32-asym", tmp_path / "model")
    request = Request(model, ("sm75", "sm89", "sm90"), tmp_path / "out", quant="a8w4", plugin=plugin["11"])
    planned = planned_and_written(request)
    gemms = [node for node in planned.lowered["sm75"].nodes if node.op == OP.name]
    assert len(gemms) == 4, "q, k and v are one; gate and up another"
    assert {(node.attrs["bits"], node.attrs["activation_bits"]) for node in gemms} == {(4, 8)}
    kinds = {artifact.target: artifact.kind for artifact in read_manifest(request.out)}
    assert kinds == {"sm75": "engine", "sm89": "engine", "sm90": "kit"}
    for target in ("sm75", "sm89"):
        assert (request.out / target / "model.engine").read_bytes().count(OP.name.encode()) >= len(gemms)
