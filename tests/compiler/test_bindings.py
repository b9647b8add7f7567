"""Full TensorRT cannot run without its GPU libraries; its Python bindings can be held to our code all the same.

The bindings are wheels of their own. The three libraries they load are stood in for by stubs, which export what is
looked up at import and nothing that works; they live in a temporary folder and are never shipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".third_party" / "tensorrt-bindings"
# The lean runtime of 10.4.0, the last release for Volta, is not on PyPI: that of a newer 10 has the same interface.
VERSIONS = {
    "10.4.0": ("tensorrt-cu12-bindings", "10.16.1.11", {"network_flags": 3, "builds_for": ["sm70"]}),
    "10.16.1.11": ("tensorrt-cu13-bindings", "10.16.1.11", {"network_flags": 3, "builds_for": ["sm75", "sm90"]}),
    "11.4.0.106": ("tensorrt-cu13-bindings", "11.4.0.106", {"network_flags": 1, "builds_for": ["sm75", "sm90"]}),
}
STUBS = {
    "nvinfer": "void* createInferBuilder_INTERNAL(void) { return 0; }\n"
    "void* getBuilderPluginRegistry(void) { return 0; }",
    "nvinfer_plugin": "int initLibNvInferPlugins(void) { return 1; }",
    "nvonnxparser": "void* createNvOnnxParser_INTERNAL(void) { return 0; }\n"
    "void* createNvOnnxParserRefitter_INTERNAL(void) { return 0; }\nint getNvOnnxParserVersion(void) { return 0; }",
}


def bindings(version: str) -> Path:
    """A folder with the bindings and a lean runtime of one release, downloaded once."""
    package, lean, _ = VERSIONS[version]
    folder = CACHE / version
    if not (folder / "tensorrt_bindings").is_dir():
        wheels = folder.with_name(f"{version}.wheels")
        names = [f"{package}=={version}", f"tensorrt-lean-cu13-libs=={lean}"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            pytest.skip(f"the bindings of TensorRT {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
        for wheel in wheels.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        shutil.rmtree(wheels)
    return folder


def stubs(folder: Path, version: str, lean: Path) -> Path:
    major = version.partition(".")[0]
    for name, code in STUBS.items():
        source = folder / f"{name}.c"
        source.write_text(code)
        library = folder / f"lib{name}.so.{major}"
        command = ["gcc", "-shared", "-fPIC", str(source), "-o", str(library), f"-Wl,-soname,{library.name}"]
        if name == "nvinfer":
            command += [f"-L{lean}", "-Wl,--no-as-needed", f"-l:libnvinfer_lean.so.{major}", f"-Wl,-rpath,{lean}"]
        subprocess.run(command, check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_builders_code_on_real_bindings(version: str, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make the stub libraries with")
    package = bindings(version)
    libraries = stubs(tmp_path, version, package / "tensorrt_lean_libs")
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "PYTHONPATH": os.pathsep.join([str(package), str(ROOT)]),
    }
    (tmp_path / "m.onnx").touch()
    command = [sys.executable, str(Path(__file__).with_name("tensorrt_probe.py")), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "version": version,
        "rtx": False,
        **VERSIONS[version][2],
        "flags": [True, True],
        "pool": True,
        "hardware": True,
        "level": 3,
        "progress": [[0.5, "Building"]],
        "plan": True,
        "cache": "timings",
        "layers": "Layers:",
    }
