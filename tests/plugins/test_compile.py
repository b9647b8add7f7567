"""The kernels compiled for GPUs: every instance is there, nothing spills, registers in budget, the right instructions.

By default for the two SMs that between them have all the code (75: no asynchronous copies, narrower MMAs; 90a: all that
80 has, and warpgroups); KERNEL_SMS=all compiles for every supported SM, KERNEL_SMS=86,120 for those.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from instantrt.tools.gpu.library import Library
from tests.once import kept
from tests.plugins.kernels import ROOT, SOURCE, TOOLS, WITH_TOOLS, cuda_wheels, version

pytestmark = pytest.mark.slow

ALL = ("75", "80", "86", "89", "90a", "100", "120")
DEFAULT = ("75", "90a")
ASKED = os.environ.get("KERNEL_SMS", ",".join(DEFAULT))
SMS = ALL if ASKED == "all" else tuple(ASKED.split(","))
REPORT = "ptxas.txt"
BUDGETS: dict[str, int] = json.loads((SOURCE / "registers.json").read_text())

SMS_OF = dict(re.findall(r'\.name = "(\w+)", .*?\.sms = (\w+)', (SOURCE / "config.h").read_text()))
ROWS = tuple(SMS_OF)
FOR_HOPPER = [row for row, sms in SMS_OF.items() if sms == "kSm90"]


@dataclass(frozen=True)
class Compiled:
    kernel: str  # as in registers.json
    type: str
    bits: int
    sm: str
    registers: int
    spills: int


@pytest.fixture(scope="session")
def build(pytestconfig: pytest.Config) -> tuple[Path, str]:
    """The CMake build as users run it -> its folder and what the compiler reported."""
    nvcc = shutil.which("nvcc", path=str(cuda_wheels() or "") + "/bin" + os.pathsep + TOOLS)
    if nvcc is None:
        pytest.skip("compiling the kernels needs nvcc: on PATH, or the wheels that plugins/CMakeLists.txt names")
    for tool in ("cmake", "ninja", "c++filt"):
        if shutil.which(tool, path=TOOLS) is None:
            pytest.skip(f"compiling the kernels needs {tool} on PATH")
    sources = ROOT / "plugins", Path(__file__)
    folder = kept(pytestconfig, "kernels", sources, version(nvcc) + version("c++filt") + str(SMS), compile_kernels)
    return folder, (folder / REPORT).read_text()


def compile_kernels(folder: Path) -> None:
    architectures = ";".join(f"{sm}-real" for sm in SMS)
    configure = ["cmake", "-S", str(ROOT / "plugins"), "-B", str(folder), "-G", "Ninja", "-DPTXAS_REPORT=ON"]
    configure += [f"-DPYTHON={sys.executable}"]
    subprocess.run(
        [*configure, f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"], check=True, capture_output=True, env=WITH_TOOLS
    )
    made = subprocess.run(
        ["cmake", "--build", str(folder)], capture_output=True, text=True, check=False, env=WITH_TOOLS
    )
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    assert "warning" not in made.stdout, "the kernels compile without warnings"
    assert "Performance Loss" not in made.stdout, "ptxas serialized warpgroup products"
    read = subprocess.run(["c++filt"], input=made.stdout, capture_output=True, text=True, check=True)
    (folder / REPORT).write_text(read.stdout)


def name(kernel: str, arguments: str) -> tuple[str, str, int]:
    """gemm<Half, 4, 34> -> ("tile64", "Half", 4): rows of the table by their names."""
    kind, *numbers = (a.strip() for a in arguments.split(","))
    if kernel == "rows":
        return "quantize" if numbers[0] == "true" else "sums", kind, 0
    if kernel in ("gemm", "stream", "tiles", "hopper"):
        bits, row = (int(n) for n in numbers if n.isdigit())
        return ROWS[row], kind, bits
    return kernel, kind, int(numbers[0]) if numbers else 0


@pytest.fixture(scope="session")
def compiled(build: tuple[Path, str]) -> list[Compiled]:
    pattern = re.compile(
        r"Compiling entry function 'void wog::\(anonymous namespace\)::(\w+)<([^>]*)>\(.*?' for 'sm_(\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = pattern.findall(build[1])
    return [Compiled(*name(k, a), sm, int(used), int(stores) + int(loads)) for k, a, sm, stores, loads, used in found]


EMPTY = 8  # registers of an instance whose body is left out because the table never chooses it there


@pytest.mark.parametrize("sm", SMS)
def test_every_instance_that_the_table_can_choose_is_built(compiled: list[Compiled], sm: str) -> None:
    built = {(c.kernel, c.type, c.bits) for c in compiled if c.sm == sm and c.registers > EMPTY}
    turing, hopper = sm == "75", sm == "90a"
    rows = [r for r in ROWS if r not in ("dense", "plain") and r.endswith("_turing") == turing]
    rows = [r for r in rows if hopper or r not in FOR_HOPPER]
    types = ("Half",) if turing else ("Half", "Bfloat")
    chosen = {(r, t, b) for r in rows for t in types for b in (4, 8)}
    always = {(k, t, 0) for k in ("plain", "quantize", "sums", "epilogue") for t in ("Half", "Bfloat")}
    dequantize = {("dequantize", t, b) for t in ("Half", "Bfloat") for b in (4, 8)}
    assert built == chosen | always | dequantize


def test_nothing_spills_and_registers_stay_in_budget(compiled: list[Compiled]) -> None:
    assert {c.sm for c in compiled} == set(SMS)
    assert [c for c in compiled if c.spills] == []
    assert [c for c in compiled if c.registers > BUDGETS[c.kernel]] == []


def test_the_real_library_loads_without_a_gpu(build: tuple[Path, str]) -> None:
    library = Library(build[0] / "libinstantrt_kernels.so")
    plan = library.choose(m=1, n=4096, k=4096, group=128, bits=4, activation_bits=16, sm=90, sm_count=132)
    assert plan.kernel == "ring8_deep"


def disassembler() -> dict[str, str]:
    """An environment in which cuobjdump is found: PATH, or the wheels nvidia-cuda-cuobjdump and -nvdisasm."""
    folders = [str(p) for p in (ROOT / ".third_party").glob("*/nvidia/cu13/bin")]
    if wheels := cuda_wheels():
        folders.append(str(wheels / "bin"))
    path = os.pathsep.join([os.environ["PATH"], *folders])
    if not shutil.which("cuobjdump", path=path) or not shutil.which("nvdisasm", path=path):
        pytest.skip("reading machine code needs cuobjdump and nvdisasm: the wheels nvidia-cuda-cuobjdump, -nvdisasm")
    return {**os.environ, "PATH": path}


@cache
def machine_code(library: Path, sm: str) -> str:
    command = ["cuobjdump", "-sass", "-arch", f"sm_{sm}", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=disassembler()).stdout


@pytest.mark.parametrize("sm", SMS)
def test_machine_code_has_the_right_instructions(build: tuple[Path, str], sm: str) -> None:
    dump = machine_code(build[0] / "libinstantrt_kernels.so", sm)
    kinds = "HMMA|HGMMA|IMMA|IGMMA|LDGSTS|LDL|STL|ATOM|RED|UTMALDG|UBLKCP|USETMAXREG"
    seen = Counter(re.findall(rf"(?<![\w.])({kinds})(\.[A-Za-z0-9_.]+)?\b", dump))
    names = {"".join(key) for key in seen}
    expected = (
        {"HMMA.1688.F32", "IMMA.8816.U8.S8"}
        if sm == "75"
        else {"HMMA.16816.F32", "HMMA.16816.F32.BF16", "IMMA.16832.U8.S8", "LDGSTS.E.BYPASS.128"}
    )
    if sm == "90a":
        expected |= {f"HGMMA.64x{n}x16.F32{t}" for n in (64, 128) for t in ("", ".BF16")}
        expected |= {f"IGMMA.64x{n}x32.S8.S8" for n in (64, 128, 256)}
        expected |= {"UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UBLKCP.S.G"}
        expected |= {"USETMAXREG.DEALLOC.CTAPOOL", "USETMAXREG.TRY_ALLOC.CTAPOOL"}
    assert expected <= names, f"missing {sorted(expected - names)}"
    assert {n for n in names if n.startswith(("LDL", "STL"))} == set(), "local memory: a spilled or indexed array"
    assert {n for n in names if n.startswith(("ATOM", "RED"))} == set(), "atomics would make results depend on timing"


# Instructions of the loop that streams weights, for each of its products of tensor cores, of which it has 5 for 64
# weights of a lane at up to 8 rows of x (6 for 32 in rows of two strips), and twice as many at up to 16. What can be
# issued while weights arrive bounds this, not only the memory. Counted with what ends of tiles add, half of all.
MOST_A_PRODUCT = {
    ("ring8", 4): 24, ("ring8", 8): 25, ("ring16", 4): 14, ("ring16", 8): 15,
    ("ring8_ampere", 4): 29, ("ring8_ampere", 8): 30, ("ring8_ampere_wide", 4): 24, ("ring8_ampere_wide", 8): 26,
    ("ring16_ampere", 4): 17, ("ring16_ampere", 8): 17, ("ring16_ampere_wide", 4): 14, ("ring16_ampere_wide", 8): 15,
}  # fmt: skip


def streaming_loop(library: Path, row: str, bits: int) -> list[str]:
    """The instructions of the shortest loop of a row, for fp16, that multiplies and loads weights."""
    kernel = "stream" if row.startswith("ring") else "gemm"
    sm = next((sm for sm in SMS if sm == "90a" or (sm != "75" and row not in FOR_HOPPER)), None)
    if sm is None:
        pytest.skip(f"{row} streams on {'sm_90a' if row in FOR_HOPPER else 'sm_80 and newer'}")
    index, load = Library(library).rows().index(row), "LDGSTS" if kernel == "stream" else "LDG.E.NA"
    (code,) = (
        text
        for text in machine_code(library, sm).split("Function : ")[1:]
        if re.search(rf"{kernel}I4HalfLi{bits}ELi{index}E(Lb0E)?E", text.split("\n")[0])
    )
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    place = {at: i for i, (at, _) in enumerate(instructions)}
    jumps = [(i, re.search(r"BRA.* 0x([0-9a-f]+)", text), at) for i, (at, text) in enumerate(instructions)]
    loops = [(place[int(to[1], 16)], i) for i, to, at in jumps if to and int(to[1], 16) < at]
    bodies = [[text for _, text in instructions[first : last + 1]] for first, last in loops]
    return min((b for b in bodies if any("MMA" in t for t in b) and any(load in t for t in b)), key=len)


@pytest.mark.parametrize(("row", "bits"), MOST_A_PRODUCT)
def test_the_streaming_loops_stay_short(build: tuple[Path, str], row: str, bits: int) -> None:
    """What a memory-bound kernel may not have: more instructions than can be issued while its weights arrive."""
    body = streaming_loop(build[0] / "libinstantrt_kernels.so", row, bits)
    assert len(body) / sum("HMMA" in text for text in body) <= MOST_A_PRODUCT[row, bits], len(body)


STAGES = {"ring8": 3, "ring8_narrow": 6, "ring8_deep": 7, "ring16": 3, "ring8_ampere": 3, "ring16_ampere": 3}


@pytest.mark.parametrize(("row", "stages"), STAGES.items())
def test_rings_wait_for_the_oldest_stage_alone(build: tuple[Path, str], row: str, stages: int) -> None:
    """A wait that lets the younger stages' copies go on, which loads into registers cannot have: ptxas counts all of a
    loop's on one scoreboard, and a wait for one drains them.
    """
    library = build[0] / "libinstantrt_kernels.so"

    def counted(row: str) -> list[int]:
        return [int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, 0x(\w+)", "\n".join(streaming_loop(library, row, 4)))]

    assert counted(row) == [stages - 2]
    assert not any(counted("int8_stream8")), "x alone comes by copies there, and all of it is waited for"
