"""Things built once for all runs, until their sources change: the emulated kernels, the emulated ones for Volta."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instantrt.tools.gpu.library import Library
from tests.once import kept
from tests.plugins import kernels
from tests.plugins.kernels import EMULATOR, Emulated, build_emulators, compiled_files, version


@pytest.fixture(scope="session")
def emulated(pytestconfig: pytest.Config) -> dict[int, Emulated]:
    """By SM: the kernels' sources on the CPU. One build sees them as Turing does, one as Ampere and all after it."""
    folder = emulators(pytestconfig, 75, 90)
    turing, newer = (Library(folder / f"emulated_{sm}.so") for sm in (75, 90))
    return {75: Emulated(turing, 75), 80: Emulated(newer, 80), 90: Emulated(newer, 90)}


@pytest.fixture(scope="session")
def volta(pytestconfig: pytest.Config) -> Emulated:
    """The kernels of the library for Volta, on the CPU."""
    return Emulated(Library(emulators(pytestconfig, 70) / "emulated_70.so"), 70)


def emulators(config: pytest.Config, *sms: int) -> Path:
    """The folder of the emulated kernels, a library for each of `sms`."""
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    name = "emulators_" + "_".join(map(str, sms))
    sources = *compiled_files(), EMULATOR, Path(kernels.__file__)
    return kept(config, name, sources, version("g++"), lambda new: build_emulators(new, sms))


@pytest.fixture
def choose(cpu_library: Path) -> Iterator[Callable[[str], None]]:
    """Has these kernels run from now on; the test is skipped where this CPU has none of them."""
    call = ctypes.CDLL(str(cpu_library)).instantrt_cpu_kernels
    call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    before = call(b"")

    def choose(name: str) -> None:
        if call(name.encode()) != name.encode():
            pytest.skip(f"this CPU does not run the {name} kernels")

    yield choose
    call(before)
