"""The libraries that are built on a GPU machine, of the kernels and of the benchmark, and how."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from instantrt.tools.places import ROOT

FOLDER = ROOT / "build" / "gpu_check_libraries"
PATIENCE = 300  # seconds


def run(command: list[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output. A program that is absent, or silent for minutes beside a lost GPU, has failed, too."""
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def target(sm: int, here: int) -> list[str]:
    return ["-gencode", f"arch=compute_{sm},code=sm_{here}"]


def cmake(out: Path, *options: str) -> str:
    """libinstantrt_kernels.so; what went wrong, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    configure = ["cmake", "-S", "plugins", "-B", str(out.parent), "-G", "Ninja", *options]
    for command in (configure, ["cmake", "--build", str(out.parent), "--target", "instantrt_kernels"]):
        status, text = run(command)
        if status:
            return f"{' '.join(command)} failed:\n{text[-4000:]}"
    return ""


def nvcc(out: Path, *arguments: str) -> str:
    """A library without CMake; what went wrong, or nothing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    status, text = run(["nvcc", "-O3", "-shared", "-Xcompiler", "-fPIC", *arguments, "-o", str(out)])
    return text[-4000:] if status else ""


def own(out: Path, here: int) -> str:
    """The kernels for this GPU."""
    return cmake(out, f"-DCMAKE_CUDA_ARCHITECTURES={here}{'a' if here == 90 else ''}-real")


def older(sm: int, out: Path, here: int) -> str:
    """What an older SM gets, compiled for this one: of PTX each process would compile all, for minutes."""
    return cmake(out, "-DCMAKE_CUDA_ARCHITECTURES=OFF", f"-DCMAKE_CUDA_FLAGS={' '.join(target(sm, here))}")


def volta(out: Path, here: int) -> str:
    """Volta's kernels, whose m8n8k4 products newer GPUs compute, too: slowly, and right."""
    sources = [f"plugins/weight_only_gemm/{name}" for name in ("volta.cu", "volta.cpp", "choices.cpp", "config.cpp")]
    options = ["-std=c++20", "-DWOG_VOLTA", "-x", "cu", *target(75, here), "-Iplugins/runtime/gpu"]
    return nvcc(out, *options, *sources)


def reader(out: Path, here: int) -> str:
    """The benchmark's own kernels."""
    return nvcc(out, *target(here, here), "tools/gpu/read.cu")


@dataclass(frozen=True)
class BuiltLibrary:
    """Where a library lies, and what makes it there on a GPU of an SM, saying what went wrong, or nothing."""

    path: Path
    make: Callable[[Path, int], str]
    older: bool = True  # what older GPUs run


LIBRARIES = {
    "": BuiltLibrary(FOLDER / "native" / "libinstantrt_kernels.so", own, older=False),
    "_75": BuiltLibrary(FOLDER / "75" / "libinstantrt_kernels.so", partial(older, 75)),
    "_80": BuiltLibrary(FOLDER / "80" / "libinstantrt_kernels.so", partial(older, 80)),
    "_VOLTA": BuiltLibrary(FOLDER / "volta" / "libinstantrt_kernels_volta.so", volta),
    "reader": BuiltLibrary(FOLDER / "reader" / "libread.so", reader, older=False),
}


def make_all(here: int, native: bool) -> dict[str, str]:
    """All side by side; what went wrong with each, or nothing. `native`: without what older GPUs run."""
    asked = {name: library for name, library in LIBRARIES.items() if not (native and library.older)}
    with ThreadPoolExecutor() as pool:
        said = pool.map(lambda library: library.make(library.path, here), asked.values())
        return dict(zip(asked, said, strict=True))
