"""The library for Volta as it is shipped: compiled by NVRTC 12, loaded by TensorRT, run by the CUDA driver's API.

No Volta is here. Its image is compiled for real and looked through; everything around it runs with a driver of ours
that finds kernels in that image and runs their emulated twins.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from instantrt.compiler.backend.tensorrt.build import EngineSpec, build
from instantrt.compiler.backend.tensorrt.kit import read_kit
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import SERVES, Request
from instantrt.compiler.target import find_target
from instantrt.plugins.sm70 import nvrtc
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import SILU
from tests.conftest import TINY
from tests.plugins.cases import Case
from tests.plugins.kernels import ROOT, SOURCE, WITH_TOOLS, Emulated, cuda_headers
from tests.plugins.registries import HOST, THIRD_PARTY, build_on_rtx, compile_cpp, headers, registry, rtx_alias

pytestmark = pytest.mark.slow

SM70 = ROOT / "plugins" / "sm70"
KERNELS = {f"volta_{row}_{bits}" for row in ("stream8", "stream16", "tile32", "wide32") for bits in (4, 8)}
KERNELS |= {"volta_epilogue", "volta_plain"}
BUDGETS: dict[str, int] = json.loads((SOURCE / "registers.json").read_text())
HEADERS = ("tensorrt-v10.0.1", "tensorrt-v10.4.0", "tensorrt-v10.16", "tensorrt-v11.1")


@pytest.fixture(scope="session")
def compiler() -> str:
    """libnvrtc.so.12: where $NVRTC says, installed, or unpacked under .third_party."""
    for name in (*nvrtc.candidates(), *map(str, THIRD_PARTY.glob("*/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"))):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name)
            return name
    pytest.skip("no libnvrtc.so.12, the last that compiles for Volta: pip install nvidia-cuda-nvrtc-cu12")


@dataclass(frozen=True)
class Built:
    kernels: Path
    plugins: Path
    said: str

    def plugin(self) -> Path:
        if not self.plugins.exists():
            pytest.skip(
                f"no TensorRT headers: unpack include/ of the public repository in {THIRD_PARTY.name}/{HEADERS[1]}"
            )
        return self.plugins


@pytest.fixture(scope="session")
def built(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The CMake build as users run it."""
    for tool in ("cmake", "ninja", "g++"):
        if shutil.which(tool, path=WITH_TOOLS["PATH"]) is None:
            pytest.skip(f"building the library needs {tool} on PATH")
    folder = tmp_path_factory.mktemp("sm70")
    given = [f"-DNVRTC={compiler}", f"-DPYTHON={sys.executable}", f"-DTensorRT_ROOT={THIRD_PARTY / HEADERS[1]}"]
    configure = ["cmake", "-S", str(SM70), "-B", str(folder), "-G", "Ninja", *given, f"-Dcuda={cuda_headers()}"]
    subprocess.run(configure, check=True, capture_output=True, env=WITH_TOOLS)
    build = ["cmake", "--build", str(folder)]
    made = subprocess.run(build, capture_output=True, text=True, check=False, env=WITH_TOOLS)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    warnings = [line for line in made.stdout.splitlines() if "warning" in line]
    assert [line for line in warnings if "Architectures prior to" not in line] == [], "it compiles without warnings"
    return Built(folder / "libinstantrt_kernels_sm70.so", folder / "libinstantrt_plugins_sm70.so", made.stdout)


def test_nothing_spills_and_registers_stay_in_budget(built: Built) -> None:
    pattern = re.compile(
        r"entry function '(\w+)' for 'sm_70'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = pattern.findall(built.said)
    assert {kernel for kernel, *_ in found} == KERNELS
    assert [kernel for kernel, *memory, _ in found if any(map(int, memory))] == [], "spills, or indexed arrays"
    assert [k for k, *_, used in found if int(used) > BUDGETS[re.sub(r"_[48]$", "", k)]] == []


def test_the_code_has_the_right_instructions(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In PTX: no disassembler of today reads Volta's machine code."""
    monkeypatch.setenv("NVRTC", compiler)
    text = nvrtc.compile_file(SOURCE / "volta.cu", "-arch=compute_70", result="PTX")[0].decode("utf-8", "replace")
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)^}", text, re.DOTALL | re.MULTILINE))
    assert set(bodies) == KERNELS
    for name, body in bodies.items():
        gemm = name not in ("volta_epilogue", "volta_plain")
        assert ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32" in body) == gemm, name
        assert ("ld.global.nc.L1::no_allocate.v4.u32" in body) == (gemm and "wide" not in name), name
        assert not re.search(r"\b(atom|red|ldmatrix|cp\.async|bf16)\b", body), name
        assert "__local_depot" not in body, f"{name} has an indexed array in local memory"


def test_nvcc_compiles_it_too(tmp_path: Path) -> None:
    """For newer GPUs, to check it where no Volta is: test_gpu_volta.py."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc on PATH")
    command = [
        "nvcc",
        "-std=c++20",
        "-DWOG_VOLTA",
        "-I",
        str(ROOT / "plugins/runtime/gpu"),
        "-arch=compute_75",
        "--ptx",
    ]
    subprocess.run([*command, str(SOURCE / "volta.cu"), "-o", str(tmp_path / "volta.ptx")], check=True)
    assert "mma.sync.aligned.m8n8k4" in (tmp_path / "volta.ptx").read_text()


def test_it_links_nothing_of_cuda_or_tensorrt(built: Built) -> None:
    for library in (built.kernels, built.plugin()):
        said = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", said)}
        assert needed <= {"libc", "libm", "libdl", "libgcc_s", "libstdc++", "ld-linux-x86-64", "libpthread"}
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(built.plugin())], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in symbols.stdout.splitlines() if " T " in line} == {
        "getCreators",
        "setLoggerFinder",
    }


@pytest.mark.parametrize("version", HEADERS)
def test_one_source_for_the_headers_of_every_release(version: str, tmp_path: Path) -> None:
    include = THIRD_PARTY / version / "include"
    if not include.exists():
        pytest.skip(
            f"no headers in {THIRD_PARTY.name}/{version}: include/ of that tag of the public TensorRT repository"
        )
    compile_cpp(SOURCE / "plugin.cpp", tmp_path / "plugin.o", include, "-DWOG_VOLTA", "-c")


def build_driver(folder: Path, *options: str) -> Path:
    """A libcuda.so.1 in a folder for LD_LIBRARY_PATH."""
    emulator = Path(__file__).parent / "emulator"
    folder.mkdir()
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-x", "c++"]
    command += ["-I", str(emulator), "-DDEVICE_SM=70", "-DWOG_VOLTA", *options, "-Wl,-soname,libcuda.so.1"]
    sources = [str(emulator / "libcuda.cpp"), str(SOURCE / "volta.cu")]
    subprocess.run([*command, *sources, "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver") / "lib")


DEVICE = """
import ctypes, sys
sm, count, said = ctypes.c_int32(), ctypes.c_int32(), ctypes.create_string_buffer(256)
failed = ctypes.CDLL(sys.argv[1]).wog_device(ctypes.byref(sm), ctypes.byref(count), said, ctypes.c_size_t(256))
print(failed, sm.value, count.value, said.value.decode())
"""


def python(driver: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LD_LIBRARY_PATH": str(driver), **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, env=env, cwd=ROOT
    )


def test_kernels_run_through_the_driver(built: Built, driver: Path) -> None:
    ran = python(driver, "-m", "tests.plugins.driver_cases", built.kernels)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(ran.stdout.split()) == {"stream8", "stream16", "tile32", "wide32", "plain"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "0 70 80 "),
        ({"FAKE_SM": "75"}, "0 75 80 "),  # wog_check says that another library serves it
    ],
)
def test_what_it_says_of_the_device(built: Built, driver: Path, environment: Mapping[str, str], said: str) -> None:
    assert python(driver, "-c", DEVICE, built.kernels, **environment).stdout == said + "\n"


def test_an_old_driver_is_named(built: Built, tmp_path: Path) -> None:
    old = build_driver(tmp_path / "old", "-DOLD_DRIVER")
    said = python(old, "-c", DEVICE, built.kernels).stdout
    assert said.startswith("1 0 0 WeightOnlyGemm: cannot query the device: the NVIDIA driver is older than CUDA 12")


@pytest.mark.parametrize("host", ["none", "10"])
def test_plugin_in_a_registry(built: Built, driver: Path, volta: Emulated, host: str, tmp_path: Path) -> None:
    """Built with 10.4's headers. No registry of 10.0 to 10.4 is on PyPI; that of a newer 10 has the same interfaces."""
    library = built.plugin()
    where = "-" if host == "none" else str(registry(host))
    compile_cpp(HOST, tmp_path / "host", headers("10"))
    case = Case(9, 96, 128, bits=4, group=32, bias=True, activation=SILU, gated=1).make()
    for name in ("x", "codes", "affine", "bias"):
        (tmp_path / f"{name}.bin").write_bytes(getattr(case, name).tobytes())
    ran = subprocess.run(
        [str(tmp_path / "host"), str(library), where, "9", "96", "128", str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "LD_LIBRARY_PATH": str(driver)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "done"
    assert f"core instantrt {OP.name} {OP.version}" in ran.stdout
    y = np.frombuffer((tmp_path / "y.bin").read_bytes(), np.float16).reshape(9, 48)
    assert np.array_equal(y, volta.run(case, sm_count=80))


def test_the_file_says_for_which_gpus_it_is(built: Built) -> None:
    assert SERVES.findall(built.plugin().read_bytes()) == [find_target("sm70").plugin.encode()]


def test_a_kit_with_the_plugin_parses_and_builds_on_rtx(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real parser, if of another TensorRT, and this library's own checks of every node."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(rtx_alias(tmp_path)))
    asked = {"quant": "a16w4", "group_size": 32, "builder": "kit", "plugin": built.plugin(), "max_length": 64}
    compile_model(Request(TINY, ("sm70",), tmp_path / "out", **asked))
    kit = read_kit(tmp_path / "out" / "sm70")
    (library,) = kit.settings.plugins
    assert library.read_bytes() == built.plugin().read_bytes()
    paths = (kit.onnx, tmp_path / "m.engine", tmp_path / "l.txt")
    engine = build(EngineSpec("tensorrt_rtx", *paths, kit.settings.profiles, (89,), (library,)))
    assert engine.engine.read_bytes().count(OP.name.encode()) >= 4 * 4


@pytest.mark.parametrize("changes", [{"activation_bits": 8}, {"group": 64}])
def test_a_node_that_it_cannot_run_is_refused_while_parsing(
    built: Built, tmp_path: Path, changes: dict[str, int]
) -> None:
    attrs = {**OP.attributes({"group": 32, "gated": 1}), **changes}
    refused = build_on_rtx(tmp_path, built.plugin(), attrs, n=64)
    assert refused.returncode == 1, "an error message, not a crash"
    said = "sm of the device with activation_bits 8 is 70, expected 75" if "activation_bits" in changes else "'affine'"
    assert f"WeightOnlyGemm: {said}" in refused.stderr


def test_a_host_that_only_opens_libraries(built: Built, tmp_path: Path) -> None:
    """As Triton does, with what registers this library in it; the lean runtime stands in for libnvinfer.so.10."""
    lean = registry("10")
    for library in (built.plugin(), built.plugin().with_name("libinstantrt_register_sm70.so")):
        shutil.copy(library, tmp_path)
    (tmp_path / "empty.c").write_text("")
    link = ["-Wl,--no-as-needed", f"-L{lean.parent}", f"-l:{lean.name}", f"-Wl,-rpath,{lean.parent}"]
    stand_in = ["gcc", "-shared", "-fPIC", str(tmp_path / "empty.c"), "-o", str(tmp_path / "libnvinfer.so.10")]
    subprocess.run([*stand_in, "-Wl,-soname,libnvinfer.so.10", *link], check=True)
    compile_cpp(HOST.with_name("triton_host.cpp"), tmp_path / "host", headers("10"))
    command = [str(tmp_path / name) for name in ("host", "libnvinfer.so.10", "libinstantrt_register_sm70.so")]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("found\n", "")


def test_where_nvrtc_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVRTC", "/nowhere/libnvrtc.so.12")
    with pytest.raises(SystemExit, match="pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc.find()
