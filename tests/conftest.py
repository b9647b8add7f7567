"""Fixtures that several test modules share, and the folder of exports that all processes of all runs share."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Two processes with as many threads as there are cores wait for each other: a third of all that the suite computed.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.export_cache import VARIABLE
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.plan import Plan, plan
from instantrt.compiler.request import Request
from instantrt.compiler.target import CPU_PLUGIN
from instantrt.compiler.write import write_planned
from instantrt.passes.core.rewrite import PassLog
from tests.once import kept, made_once

# A test run started in the background inherits an ignored interrupt, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Exports make millions of objects, none of them garbage; looking for some was a seventh of an export's time.
gc.set_threshold(100_000, 20, 20)

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples" / "tiny-qwen2"
LIBRARY = b"\x7fELF...getCreators\0..."  # as a plugin's may look, for what does not load it
TEXT = ROOT / "examples" / "text" / "evaluation.txt"


def contents(folder: Path) -> dict[str, str]:
    """Every file, hidden ones too, with its digest."""
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


def plugin_library(folder: Path) -> Path:
    (folder / "plugin.so").write_bytes(LIBRARY)
    return folder / "plugin.so"


def planned_and_written(request: Request) -> Plan:
    """As `compile_model`, for who wants to see the plan."""
    planned = plan(request)
    write_planned(request, planned)
    return planned


def pytest_configure(config: pytest.Config) -> None:
    """A model is exported by the first who reads it, until what exports changes: the folder is in pytest's cache."""
    assert config.cache is not None
    os.environ[VARIABLE] = str(config.cache.mkdir("exports"))


def pytest_collection_finish() -> None:
    """What torch knows of ONNX's operators is made once, not for each export, where it takes a third of a second."""
    if "torch" in sys.modules:  # tests without it need not import it
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign, assignment]


def pytest_sessionfinish() -> None:
    """pytest looks for garbage five times when it ends: so long, in all that is left, that workers are interrupted."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_float() -> FloatModel:
    """The example model, exported and normalized. Copy the graph (`graph.copy()`) before a pass changes it."""
    model = load(TINY)
    pipeline.normalize(model.graph, PassLog())
    return model


def compiled(out: Path, **fields: Any) -> Plan:
    """The example compiled, for x86 if nothing else is asked."""
    return planned_and_written(Request(TINY, fields.pop("targets", ("x86",)), out, **fields))


@pytest.fixture(scope="session")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a tiny embedding model, for x86."""
    from tests.compiler.encoder_models import embedding_model

    return made_once(tmp_path_factory, "embedding", embedding_model) / "out"


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a tiny classifier."""
    from tests.compiler.encoder_models import classifier

    return made_once(tmp_path_factory, "classes", classifier) / "out"


@pytest.fixture(scope="session")
def tiny_compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the example model, compiled for x86 with 8-bit weights."""
    request = Request(model=TINY, targets=("x86",), out=Path(), quant="a16w8")
    return made_once(tmp_path_factory, "tiny", lambda new: compile_model(replace(request, out=new / "out"))) / "out"


@pytest.fixture(scope="session")
def cpu_library(pytestconfig: pytest.Config) -> Path:
    """The library of the operators for CPUs, of this checkout's sources; what it was linked of lies beside it."""
    if platform.machine() != "x86_64":
        pytest.skip(f"{CPU_PLUGIN} is for x86_64, this is {platform.machine()}")
    if missing := [tool for tool in ("c++", "cmake") if shutil.which(tool) is None]:
        pytest.skip(f"building {CPU_PLUGIN} needs {' and '.join(missing)} on PATH")
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout
    sources = ROOT / "plugins" / "cpu", ROOT / "plugins" / "runtime"
    return kept(pytestconfig, "cpu_library", sources, compiler, build_cpu_library) / CPU_PLUGIN


def build_cpu_library(folder: Path) -> None:
    build = folder / "build"
    for step in (
        ["-S", str(ROOT / "plugins" / "cpu"), "-B", str(build)],
        ["--build", str(build)],
        ["--install", str(build), "--prefix", str(folder)],
    ):
        done = subprocess.run(["cmake", *step], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    for compiled in build.rglob("*.cpp.o"):
        shutil.move(compiled, folder)
    shutil.rmtree(build)
