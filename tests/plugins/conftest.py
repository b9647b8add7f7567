"""Things built once per run: the emulated kernels, the compiled kernels, the TensorRT layer."""

from __future__ import annotations

import shutil

import pytest

from instantrt.tools.gpu.library import Library
from tests.once import made_once
from tests.plugins.kernels import Emulated, build_emulators


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Emulated]:
    """By SM: the kernels' sources on the CPU. One build sees them as Turing does, one as Ampere and all after it."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    folder = made_once(tmp_path_factory, "emulators", lambda new: build_emulators(new, (75, 90)))
    turing, newer = (Library(folder / f"emulated_{sm}.so") for sm in (75, 90))
    return {75: Emulated(turing, 75), 80: Emulated(newer, 80), 90: Emulated(newer, 90)}


@pytest.fixture(scope="session")
def volta(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The kernels of the library for Volta, on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    folder = made_once(tmp_path_factory, "emulator_of_volta", lambda new: build_emulators(new, (70,)))
    return Emulated(Library(folder / "emulated_70.so"), 70)
