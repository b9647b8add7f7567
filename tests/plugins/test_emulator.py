"""The emulator sees what would hang a GPU, or be wrong there now and then: each of faults.cu has its message."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EMULATOR = Path(__file__).parent / "emulator"
FAULTS = {
    0: "",
    1: "at the barrier at byte 8192 of block 0, phase 0: 1 of 2 arrivals and 0 bytes missing",
    2: "0 of 1 arrivals and 4096 bytes missing",
    3: "more arrivals than the barrier at byte 8192 of block 0",
    4: "bytes that nobody announced",
    5: "a block ended before its copies had landed",
    6: "poison",
    7: "phase 1: 1 of 1 arrivals",
    8: "a fragment changed under its product",
    9: "sums changed under their product",
    10: "rows of x changed under their product",
    11: "a bank conflict of rows of a matrix",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the kernel emulator needs g++ on PATH")
    out = tmp_path_factory.mktemp("faults") / "faults"
    command = [
        "g++",
        "-std=c++20",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-DDEVICE_SM=90",
        f"-I{EMULATOR}",
        "-x",
        "c++",
        "-Wall",
        "-Werror",
    ]
    subprocess.run([*command, str(EMULATOR / "faults.cu"), "-o", str(out)], check=True)
    return out


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_abort_with_a_message(program: Path, fault: int) -> None:
    run = subprocess.run([program, str(fault)], capture_output=True, text=True, check=False)
    assert FAULTS[fault] in run.stderr
    assert (run.returncode == 0) == (fault == 0)
