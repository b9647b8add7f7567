"""Things built once per run: the emulated kernels, the compiled kernels, the TensorRT layer."""

from __future__ import annotations

import shutil

import pytest

from instantrt.tools.gpu.library import Library
from tests.plugins.kernels import Emulated, build_emulators


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Emulated]:
    """By SM: the kernels' sources on the CPU. One build sees them as Turing does, one as Ampere and all after it."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    built = build_emulators(tmp_path_factory.mktemp("emulator"), (75, 90))
    turing, newer = (Library(path) for path in built.values())
    return {75: Emulated(turing, 75), 80: Emulated(newer, 80), 90: Emulated(newer, 90)}


@pytest.fixture(scope="session")
def volta(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The kernels of the library for Volta, on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    return Emulated(Library(build_emulators(tmp_path_factory.mktemp("emulator"), (70,))[70]), 70)
