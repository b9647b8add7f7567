"""Nsight Compute where there is no GPU: its raw page, written of made-up counters for each case of the profile."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from instantrt.tools.gpu import ncu
from instantrt.tools.gpu.watch import emit


def raw_page(kernels: list[tuple[str, str, dict[str, tuple[str, str]]]]) -> str:
    """As `ncu --csv --page raw --log-file` writes it: its own lines, a head, units, a row for each kernel."""
    fixed = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size",
             "Grid Size", "Device", "CC"]  # fmt: skip
    metrics = list(dict.fromkeys(name for _, _, counters in kernels for name in counters))
    units = {name: unit for _, _, counters in kernels for name, (_, unit) in counters.items()}
    rows = [fixed + metrics, [""] * len(fixed) + [units[name] for name in metrics]]
    for i, (kernel, grid, counters) in enumerate(kernels):
        where = [str(i), "77", "python3.12", "127.0.0.1", kernel, "1", "7", "(256, 1, 1)", grid, "0", "9.0"]
        rows.append(where + [counters.get(name, ("", ""))[0] for name in metrics])
    table = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    return f"==PROF== Connected to process 77 (/usr/bin/python3.12)\n==PROF== Disconnected from process 77\n{table}\n"


STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COUNTED = {
    "gpu__time_duration.sum": ("21,504", "ns"),
    "dram__bytes.sum.per_second": ("3,214,000,000,000.5", "byte/s"),
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": ("81.25", "%"),
    "launch__registers_per_thread": ("76", "register/thread"),
    "launch__shared_mem_per_block": ("99.33", "Kbyte/block"),
    STALLED.format("long_scoreboard"): ("6", "inst"),
    STALLED.format("wait"): ("1.5", "inst"),
    STALLED.format("barrier"): ("0.25", "inst"),
    STALLED.format("selected"): ("1", "inst"),
    STALLED.format("math_pipe_throttle"): ("2.25", "inst"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("n/a", "%"),
}
GEMM = "void wog::<unnamed>::gemm<(int)12, __half, (int)4>(wog::GemmArgs)"


def main(mode: str, words: Sequence[str]) -> None:
    """`mode` says what goes wrong: nothing, a metric that is not known, or the fourth case, which dies or hangs."""
    log = Path(words[words.index("--log-file") + 1])
    cases = words[words.index("instantrt.tools.gpu.profile") + 3 :]
    if mode == "no such metric" and "--metrics" in words:
        log.write_text("==ERROR== Failed to find metric sm__pipe\n")
        for case in cases:
            emit(start=case)
            emit(end=case, outcome="passed")
        sys.exit(1)
    kernels: list[tuple[str, str, dict[str, tuple[str, str]]]] = []
    died = False
    for case in cases:
        emit(start=case)
        if case == ncu.CASES[3]:
            time.sleep(60 if mode == "hangs" else 0)
            died = mode == "dies"
        if died:
            break
        kernels += [("nothing()", f"({ncu.CASES.index(case) + 1}, 1, 1)", {}), (GEMM, "(9, 1, 1)", COUNTED)]
        emit(end=case, outcome="passed")
    log.write_text(raw_page(kernels))
    sys.exit(died)
