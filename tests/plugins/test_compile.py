"""The kernels compiled for GPUs: every instance is there, nothing spills, registers in budget, the right instructions.

By default for the two SMs that between them have all the code (75: no asynchronous copies, narrower MMAs; 90a: all that
80 has, and warpgroups); KERNEL_SMS=all compiles for every supported SM, KERNEL_SMS=86,120 for those.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from instantrt.tools.gpu.library import Library
from tests.once import kept, made_in
from tests.plugins.kernels import ROOT, SOURCE, TOOLS, WITH_TOOLS, compiled_files, cuda_wheels, version
from tests.plugins.machine_code import Code

pytestmark = pytest.mark.slow

ALL = ("75", "80", "86", "89", "90a", "100", "120")
DEFAULT = ("75", "90a")
ASKED = os.environ.get("KERNEL_SMS", ",".join(DEFAULT))
SMS = ALL if ASKED == "all" else tuple(ASKED.split(","))
REPORT = "ptxas.txt"
BUDGETS: dict[str, int] = json.loads((SOURCE / "registers.json").read_text())

TABLE = (SOURCE / "config.h").read_text()
SMS_OF = dict(re.findall(r'\.name = "(\w+)", .*?\.sms = (\w+)', TABLE))
TILES = set(re.findall(r'\.name = "(\w+)", \.kernel = Kernel::kTile\b', TABLE))
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
    made_by = [version(nvcc), version("c++filt"), str(SMS), *map(inspect.getsource, (compile_kernels, machine_code))]
    folder = kept(pytestconfig, "kernels", compiled_files(), "".join(made_by), compile_kernels)
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
    """stream<Half, 4, false, 2> -> ("ring8_narrow", "Half", 4): rows of the table by their names."""
    kind, *numbers = (a.strip() for a in arguments.split(","))
    if kernel == "rows":
        return "quantize" if numbers[0] == "true" else "sums", kind, 0
    if kernel in ("turing", "stream", "tiles", "hopper"):
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
    over = [c for c in compiled if c.registers > BUDGETS.get(f"{c.kernel} sm_{c.sm}", BUDGETS[c.kernel])]
    assert over == []


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
def machine_code(library: Path, sm: str) -> list[str]:
    """Of each function, its name and below it what `cuobjdump -sass` lists, but for the encodings: four fifths of it.

    Listing takes as long as some kernels do; it is kept beside the library.
    """

    def list_into(folder: Path) -> None:
        command = ["cuobjdump", "-sass", "-arch", f"sm_{sm}", str(library)]
        listing = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=disassembler())
        assert listing.stdout is not None
        with (folder / "sass").open("w") as file:
            for line in listing.stdout:
                if "Function : " in line:
                    file.write(line)
                elif ";" in line:
                    file.write(f"{line.partition(';')[0].lstrip()};\n")
        assert listing.wait() == 0

    return (made_in(library.parent, f"sass_{sm}", list_into) / "sass").read_text().split("Function : ")[1:]


@pytest.mark.parametrize("sm", SMS)
def test_machine_code_has_the_right_instructions(build: tuple[Path, str], sm: str) -> None:
    kinds = re.compile(
        r"(HMMA|HGMMA|IMMA|IGMMA|LDG|LDGSTS|LDL|STL|ATOM|RED|UTMALDG|UBLKCP|USETMAXREG)(\.[A-Za-z0-9_.]+)?"
    )
    names = {
        name
        for function in machine_code(build[0] / "libinstantrt_kernels.so", sm)
        for name in {*re.findall(r"\*/ +(?:@\S+ +)?([\w.]+)", function)}
        if kinds.fullmatch(name)
    }
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
    read_once = any(n.startswith("LDG.") and ".NA" in n for n in names)
    assert read_once == (sm == "75"), "weights come by copies, but on Turing, which has none"
    assert {n for n in names if n.startswith(("LDL", "STL"))} == set(), "local memory: a spilled or indexed array"
    assert {n for n in names if n.startswith(("ATOM", "RED"))} == set(), "atomics would make results depend on timing"


@pytest.mark.parametrize("sm", SMS)
def test_sums_of_parts_are_read_four_at_a_time(build: tuple[Path, str], sm: str) -> None:
    codes = machine_code(build[0] / "libinstantrt_kernels.so", sm)
    epilogues = [code for code in codes if "epilogue" in code.split("\n")[0]]
    assert len(epilogues) == 2
    for code in epilogues:
        assert "LDG.E.128" in code
        assert not re.search(r"LDG\.E(\.CONSTANT)?(\.SYS)? ", code), "single ones"


def streaming_code(library: Path, row: str, bits: int, kind: str = "Half") -> Code:
    """The machine code of a row whose weights stream; groups end at its steps' ends."""
    sm = next((sm for sm in SMS if sm == "90a" or (sm != "75" and row not in FOR_HOPPER)), None)
    if sm is None:
        pytest.skip(f"{row} streams on {'sm_90a' if row in FOR_HOPPER else 'sm_80 and newer'}")
    kernel, index = "tiles" if row in TILES else "stream", Library(library).rows().index(row)
    (code,) = (
        text
        for text in machine_code(library, sm)
        if re.search(rf"{kernel}I\d{kind}Li{bits}ELb0ELi{index}EE", text.split("\n")[0])
    )
    return Code.parse(code)


# Strips and columns of a row, and instructions that a warp executes for a weight of each lane: of int4 in groups of
# 128, fp16 and bf16, and of int8 by channel, the same. What can be issued while weights arrive bounds this, not only
# the memory. Copies of x are not counted.
MOST_A_WEIGHT = {
    "ring8": (4, 1, (1.75, 2.00, 1.47, 2.22)), "ring8_narrow": (2, 1, (2.05, 2.30, 1.71, 2.44)),
    "ring16": (4, 2, (2.07, 2.32, 1.65, 2.41)), "ring16_deep": (4, 2, (2.07, 2.32, 1.65, 2.42)),
    "ring8_ampere": (2, 1, (2.28, 2.54, 1.93, 2.68)),
    "ring8_ampere_wide": (4, 1, (1.87, 2.12, 1.59, 2.33)), "ring16_ampere": (2, 2, (2.92, 3.16, 2.35, 3.15)),
    "ring16_ampere_wide": (4, 2, (2.32, 2.57, 1.87, 2.63)),
    "int8_ring8": (2, 1, (1.32, 1.32, 0.55, 0.55)), "int8_ring16": (4, 2, (1.41, 1.41, 0.47, 0.47)),
    "int8_ring8_ampere": (2, 1, (1.55, 1.55, 0.80, 0.80)), "int8_ring16_ampere": (2, 2, (2.20, 2.20, 1.10, 1.10)),
}  # fmt: skip


def executed(code: Code, bits: int, strips: int, columns: int, int8: bool) -> float:
    """Instructions for a weight of each lane, of the steps that most are. Of int4, with what ends a group of two steps,
    and with what begins one when weights are sent for: that is the next cheapest way round a step.
    """
    product, deep = ("IMMA", 32) if int8 else ("HMMA", 16)
    products, ends = 64 // deep * (strips + 1) * columns, 8 * strips * columns
    step, other = code.loop(product, "LDGSTS").ways(2, FFMA=0, **{product: products})
    if bits == 4:
        (group,) = code.loop(product, "LDGSTS", "FFMA").ways(1, FFMA=ends, **{product: 2 * products})
        return (group + other - step) / (2 * 32 * strips)
    return step / (32 * strips)


@pytest.mark.parametrize("row", MOST_A_WEIGHT)
def test_the_streaming_loops_execute_little(build: tuple[Path, str], row: str) -> None:
    """What a memory-bound kernel may not have: more instructions than can be issued while its weights arrive."""
    library, (strips, columns, most) = build[0] / "libinstantrt_kernels.so", MOST_A_WEIGHT[row]
    kinds = [(bits, kind) for bits in (4, 8) for kind in ("Half", "Bfloat")]
    int8 = row.startswith("int8")
    counts = [executed(streaming_code(library, row, bits, kind), bits, strips, columns, int8) for bits, kind in kinds]
    assert all(count <= limit for count, limit in zip(counts, most, strict=True)), counts


# Of rows of tiles: strips, and instructions for a product, in the same order, where no group ends
MOST_A_PRODUCT = {
    "ring32": (3, (4.40, 4.90, 4.25, 5.78)), "ring32_narrow": (2, (4.94, 5.41, 4.82, 6.35)),
    "ring64": (3, (4.40, 4.90, 4.25, 5.78)), "ring64_narrow": (2, (4.94, 5.41, 4.82, 6.35)),
    "ring32_ampere": (3, (4.40, 4.90, 4.25, 5.78)), "ring64_ampere": (3, (4.40, 4.90, 4.25, 5.78)),
    "ring64_ampere_narrow": (2, (4.94, 5.41, 4.82, 6.35)), "int8_ring32": (3, (4.34, 4.34, 3.09, 3.09)),
    "int8_ring32_ampere": (3, (4.34, 4.34, 3.09, 3.09)), "int8_ring64_ampere": (3, (4.34, 4.34, 3.09, 3.09)),
    "int8_ring64_ampere_narrow": (2, (5.00, 5.00, 3.82, 3.82)),
}  # fmt: skip


def test_the_loops_of_tiles_execute_little(build: tuple[Path, str]) -> None:
    library, counts = build[0] / "libinstantrt_kernels.so", {}
    if "90a" not in SMS:
        pytest.skip("the rows of tiles are all in code of sm_90a")
    for row, (strips, _) in MOST_A_PRODUCT.items():
        product, products = ("IMMA", 8 * strips) if row.startswith("int8") else ("HMMA", 16 * strips)
        codes = [streaming_code(library, row, bits, kind) for bits in (4, 8) for kind in ("Half", "Bfloat")]
        steps = [code.loop(product, "FFMA").ways(1, FFMA=0, **{product: products}) for code in codes]
        counts[row] = [step / products for (step,) in steps]
    assert counts.keys() == TILES
    over = {row: n for row, n in counts.items() if any(c > m for c, m in zip(n, MOST_A_PRODUCT[row][1], strict=True))}
    assert over == {}


STAGES = {
    "ring8": 3, "ring8_narrow": 6, "ring8_deep": 7, "ring16": 3, "ring16_deep": 4, "ring8_ampere": 3,
    "ring16_ampere": 3, "int8_ring8": 6, "int8_ring16": 5, "int8_ring8_ampere": 3,
}  # fmt: skip


@pytest.mark.parametrize(("row", "stages"), STAGES.items())
def test_rings_wait_for_the_oldest_stage_alone(build: tuple[Path, str], row: str, stages: int) -> None:
    """A wait that lets the younger stages' copies go on, which loads into registers cannot have: ptxas counts all of a
    loop's on one scoreboard, and a wait for one drains them.
    """
    loop = streaming_code(build[0] / "libinstantrt_kernels.so", row, 4).loop("MMA", "LDGSTS")
    waits = [int(n, 16) for n in re.findall(r"DEPBAR\.LE SB0, 0x(\w+)", "\n".join(loop.at.values()))]
    assert waits == [stages - 2]
