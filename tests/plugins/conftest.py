"""Things built once per run: the emulated kernels, the compiled kernels, the TensorRT layer."""

from __future__ import annotations

import shutil

import pytest

from tests.plugins.kernels import Emulated, build_emulators
from tools.gpu.library import Library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Emulated]:
    """The kernels' sources on the CPU: as sm_80 and later see them, and as Turing does."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    built = build_emulators(tmp_path_factory.mktemp("emulator"), (75, 80))
    return {sm: Emulated(Library(path), sm) for sm, path in built.items()}
