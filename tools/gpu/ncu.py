"""Nsight Compute: how it is called, which cases it sees, and what a person reads of its counters."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = (1, 16, 64, 512)
PLACES = [f"{layer} m={m}" for layer in ("qwen2-7b gate_up", "qwen2-7b o") for m in ROWS]
CASES = (
    [f"int4 g128, {place}" for place in PLACES]
    + [f"int8, {place}" for place in PLACES if place.endswith((" m=1", " m=16"))]
    + [f"a8w8, {place}" for place in PLACES if place.endswith(" m=512")]
    + [f"cublas fp16, {place}" for place in PLACES]
)
PATHS = ("/usr/local/cuda/bin/ncu", "/opt/nvidia/nsight-compute/ncu")
SECTIONS = (
    "SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "SchedulerStats", "LaunchStats", "Occupancy",
    "ComputeWorkloadAnalysis",
)  # fmt: skip
MARK = re.compile(r"\bnothing\b")  # the kernel whose blocks number a case
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
UNITS = {  # what --print-units base does not leave to chance, where it is not obeyed
    "ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0, "second": 1.0,
    "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12, "Khz": 1e3, "Mhz": 1e6, "Ghz": 1e9,
    "KHz": 1e3, "MHz": 1e6, "GHz": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class Counter:
    """A column of the table: the first of `metrics` that the report has, in SI units, times `scale`."""

    name: str
    metrics: tuple[str, ...]
    scale: float = 1.0
    form: str = "7.1f"


PEAK = "avg.pct_of_peak_sustained"
COUNTERS = (
    Counter("us", ("gpu__time_duration.sum",), 1e6, "8.2f"),
    Counter("GB/s", ("dram__bytes.sum.per_second", "dram__bytes_read.sum.per_second"), 1e-9, "7.0f"),
    Counter("dram%", (f"gpu__dram_throughput.{PEAK}_elapsed", f"dram__throughput.{PEAK}_elapsed"), form="6.1f"),
    Counter("L2%", (f"lts__throughput.{PEAK}_elapsed", f"lts__t_sectors.{PEAK}_elapsed"), form="6.1f"),
    Counter("tensor%", (
        f"sm__pipe_tensor_cycles_active.{PEAK}_elapsed", f"sm__pipe_tensor_cycles_active.{PEAK}_active",
        f"sm__inst_executed_pipe_tensor.{PEAK}_active",
    )),
    Counter("IPC", ("sm__inst_executed.avg.per_cycle_active", "sm__inst_issued.avg.per_cycle_active"), form="5.2f"),
    Counter("issue%", ("smsp__issue_active.avg.per_cycle_active",), 100, "6.1f"),
    Counter("occ%", (f"sm__warps_active.{PEAK}_active",), form="5.1f"),
    Counter("regs", ("launch__registers_per_thread",), form="5.0f"),
    Counter("smem KB", ("launch__shared_mem_per_block", "launch__shared_mem_per_block_allocated"), 1e-3),
    Counter("MHz", ("gpc__cycles_elapsed.avg.per_second", "smsp__cycles_elapsed.avg.per_second"), 1e-6, "6.0f"),
)  # fmt: skip
ASKED = (f"sm__pipe_tensor_cycles_active.{PEAK}_elapsed", "dram__bytes.sum.per_second")  # no section is sure to have


def executable() -> str | None:
    found = shutil.which("ncu")
    places = [*PATHS, *sorted(str(p) for p in Path("/opt/nvidia/nsight-compute").glob("*/ncu"))]
    return found or next((path for path in places if shutil.which(path)), None)


def command(ncu: str, log: Path, metrics: bool) -> list[str]:
    """`metrics`: ask for ASKED, too. One that this GPU has not ends ncu, so that it may be left."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    more = ["--metrics", ",".join(ASKED)] if metrics else []
    how = ["--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    return [ncu, *how, *sections, *more, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def in_base(value: float, unit: str) -> float:
    """SI: seconds, bytes, hertz. "Gbyte/s", "Gbyte/second" and "Kbyte/block" are a unit of each something."""
    return value * UNITS.get(unit.partition("/")[0], 1.0)


def parse(text: str) -> list[dict[str, Any]]:
    """Kernels of a raw page, in order: name, grid and every counter that is a number.

    Its lines before the head are ncu's own; the first row below the head has the units.
    """
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if head is None:
        return []
    quoted = [line for line in lines[head:] if line.startswith('"') and not line.startswith('"==')]
    names, *rows = csv.reader(quoted)
    units: dict[str, str] = {}
    if rows and not rows[0][0]:
        units = dict(zip(names, rows.pop(0), strict=False))
    found = []
    for row in rows:
        cells = dict(zip(names, row, strict=False))
        values = {name: number(cell) for name, cell in cells.items() if "__" in name}
        counters = {name: in_base(v, units.get(name, "")) for name, v in values.items() if v is not None}
        found.append({"kernel": cells.get("Kernel Name", ""), "grid": cells.get("Grid Size", ""), "counters": counters})
    return found


def by_case(kernels: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Each case's kernels: those behind the empty one that numbers it."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    case = ""
    for kernel in kernels:
        if MARK.search(kernel["kernel"]):
            blocks = int(re.findall(r"\d+", kernel["grid"])[0])
            case = CASES[blocks - 1] if 0 < blocks <= len(CASES) else ""
            continue
        if case:
            found.setdefault(case, []).append(kernel)
    return found


def summarize(case: str, kernel: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of one kernel; an absent counter is None."""
    have = kernel["counters"]
    row: dict[str, Any] = {"case": case, "kernel": kernel["kernel"], "grid": kernel["grid"]}
    for counter in COUNTERS:
        value = next((have[name] for name in counter.metrics if name in have), None)
        row[counter.name] = None if value is None else value * counter.scale
    stalls = {match[1]: value for name, value in have.items() if (match := STALL.fullmatch(name))}
    stalls.pop("selected", None)  # that is no stall
    total = sum(stalls.values()) or 1.0
    top = sorted(stalls.items(), key=lambda item: -item[1])[:3]
    return row | {"stalls": [[name, value, value / total] for name, value in top]}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each kernel; of stalls, the cycles between two instructions of a warp and their share."""
    widths = [max(int(c.form.split(".")[0]), len(c.name) + 1) for c in COUNTERS]
    head = "".join(f"{c.name:>{width}}" for c, width in zip(COUNTERS, widths, strict=True))
    lines = [f"{'profiled':33} {'kernel':22}{head}  stalls"]
    for row in rows:
        *counted, stalls = cells(row)
        counters = "".join(f"{cell or '-':>{width}}" for cell, width in zip(counted, widths, strict=True))
        lines.append(f"{row['case']:33} {short(row['kernel']):22}{counters}  {stalls}")
    return lines


def cells(row: Mapping[str, Any]) -> list[str]:
    """The counters of a kernel, nothing for one that is absent, and its stalls."""
    counters = ["" if row[c.name] is None else format(row[c.name], c.form).strip() for c in COUNTERS]
    return [*counters, ", ".join(f"{name} {value:.1f} ({share:.0%})" for name, value, share in row["stalls"])]


def short(kernel: str) -> str:
    """A kernel's own name, without its type, namespaces and parameters; of a template its first arguments."""
    bare = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\w+::|^void ", "", kernel)
    return bare.partition("(")[0][:22]
