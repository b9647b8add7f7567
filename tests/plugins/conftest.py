"""Things built once per run: the emulated kernels, the compiled kernels, the TensorRT layer."""

from __future__ import annotations

import shutil

import pytest

from tests.plugins.kernels import Emulated, Library, build_emulator


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Emulated]:
    """The kernels' sources on the CPU: as sm_80 and later see them, and as Turing does."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    folder = tmp_path_factory.mktemp("emulator")
    return {sm: Emulated(Library(build_emulator(folder, sm)), sm) for sm in (75, 80)}
