"""What the kernels were predicted to reach before they first ran on a GPU, and how far off that was: pure functions.

A prediction is a range on one kind of GPU, of the fraction of the measured read rate that the bytes of a launch make
up, of the speed of cuBLAS fp16, or of microseconds. `with a ring` says what the streaming kernels were predicted to
reach with weights in a ring of shared memory, `as they were` without: with loads straight into registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FAR = 0.2  # off by more than this is named
READ, CUBLAS, MICROSECONDS = "of the read rate", "x cuBLAS fp16", "us"
BEFORE, RING = "as they were", "with a ring"
Range = tuple[float, float]
LARGE = ("qwen2-7b gate_up", "llama3-8b gate_up", "70b gate_up")
GATE_UP, DEEP = ("qwen2-7b gate_up",), ("qwen2-7b down", "llama3-8b down", "70b o", "70b gate_up")
ANY: tuple[str, ...] = ()  # layers


@dataclass(frozen=True)
class Prediction:
    """For every layer of `layers` (none: every layer) and every m of `rows`, by the name of the GPU."""

    kernel: str
    layers: tuple[str, ...]
    rows: tuple[int, int]
    unit: str
    by_gpu: Mapping[str, Range]
    of: str = BEFORE


PREDICTIONS = (
    Prediction("int4 g128", GATE_UP, (1, 1), READ, {"H200": (0.60, 0.75), "H100": (0.80, 0.90)}),
    Prediction("int4 g128", GATE_UP, (1, 1), READ, {"H200": (0.85, 0.90), "H100": (0.90, 1.0)}, RING),
    Prediction("int4 g64", GATE_UP, (1, 1), READ, {"H200": (0.55, 0.55), "H100": (0.75, 0.75)}),
    Prediction("int4 g32", GATE_UP, (1, 1), READ, {"H200": (0.40, 0.45), "H100": (0.60, 0.60)}),
    Prediction("int8", LARGE, (1, 1), READ, {"H200": (0.85, 0.85), "H100": (0.90, 0.90)}),
    Prediction("int4 g128", ("qwen2-7b o",), (1, 1), MICROSECONDS, {"H200": (4.2, 5.0), "H100": (4.5, 5.0)}),
    Prediction("int4 g128", DEEP, (16, 16), READ, {"H200": (0.40, 0.50), "H100": (0.55, 0.65)}),
    Prediction("int4 g128", ANY, (32, 32), READ, {"H200": (0.50, 0.60), "H100": (0.65, 0.75)}),
    Prediction("int4 g128", ("llama3-8b o",), (64, 64), MICROSECONDS, {"H200": (7.0, 7.5), "H100": (8.0, 8.0)}),
    Prediction("int4 g128", ANY, (512, 1 << 30), CUBLAS, {"H200": (0.75, 0.95), "H100": (0.75, 0.95)}),
)


def compare(timings: Sequence[Mapping[str, Any]], read_bytes_per_us: float, gpu: str) -> list[dict[str, Any]]:
    """A row for each prediction and timing that it is about; `off` is 0 in the range, else how far from its end."""
    cublas = {(t["layer"], t["m"]): t["median"] for t in timings if t["kernel"] == "cublas fp16"}
    found = []
    for p in PREDICTIONS:
        expected = next((r for name, r in p.by_gpu.items() if name in gpu), None)
        for t in timings:
            here = t["kernel"] == p.kernel and (not p.layers or t["layer"] in p.layers)
            if expected is None or not here or not p.rows[0] <= t["m"] <= p.rows[1]:
                continue
            measured = {
                READ: t["bytes"] / t["median"] / read_bytes_per_us,
                CUBLAS: cublas.get((t["layer"], t["m"]), float("nan")) / t["median"],
                MICROSECONDS: t["median"],
            }[p.unit]
            if measured == measured:  # noqa: PLR0124 -- not NaN: its reference was timed
                found.append({
                    "kernel": p.kernel, "layer": t["layer"], "m": t["m"], "unit": p.unit, "of": p.of,
                    "predicted": list(expected), "measured": measured, "off": off(measured, expected),
                })  # fmt: skip
    return found


def off(measured: float, expected: Range) -> float:
    """Relative distance from the nearer end of the range, negative below it."""
    nearest = min(max(measured, expected[0]), expected[1])
    return measured / nearest - 1


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those far off say so; of each prediction `as they were` and `with a ring`, one is for the kernels of today."""
    lines = [f"{'predicted':48} {'range':>13} {'measured':>9} {'off':>6}"]
    for r in rows:
        low, high = r["predicted"]
        name = f"{r['kernel']} {r['layer']} m={r['m']}, {r['of']}"
        word = f"  OFF BY OVER {FAR:.0%}" if abs(r["off"]) > FAR else ""
        lines.append(f"{name:48} {low:6.2f}-{high:6.2f} {r['measured']:9.2f} {r['off']:6.0%} {r['unit']}{word}")
    return lines
