"""What the kernels are to reach, as data, and what a report says about it: pure functions of OUT.json.

Every goal has one form: time <= factor * reference + extra, for the rows and sizes of weights that it names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOOR, ONE_ROW = "floor", "m=1"  # references that are no other kernel
MB = 1e6
LARGE, MEDIUM, SMALL, ANY = (30 * MB, float("inf")), (6 * MB, 20 * MB), (0.0, 16 * MB), (0.0, float("inf"))
MANY = 1 << 30


@dataclass(frozen=True)
class Goal:
    """`size` bounds the bytes that the kernel moves for one row of x, which is its weights; times in microseconds."""

    name: str
    kernel: str
    rows: tuple[int, int]
    size: tuple[float, float]
    reference: str  # FLOOR, ONE_ROW or a kernel
    factor: float
    extra: float = 0.0


GOALS = (
    Goal(
        "int4 g128 within floor / 0.85 + 2 us, up to 8 rows, from 30 MB", "int4 g128", (1, 8), LARGE, FLOOR, 1 / 0.85, 2
    ),
    Goal("int8 within floor / 0.85 + 2 us, up to 8 rows, from 30 MB", "int8", (1, 8), LARGE, FLOOR, 1 / 0.85, 2),
    Goal(
        "int4 g128 within floor / 0.85 + 2 us, up to 8 rows, to 20 MB", "int4 g128", (1, 8), MEDIUM, FLOOR, 1 / 0.85, 2
    ),
    Goal("int4 g128 within floor / 0.70 at 32 rows", "int4 g128", (32, 32), ANY, FLOOR, 1 / 0.70),
    Goal("int4 g128 within floor / 0.65 at 64 rows", "int4 g128", (64, 64), ANY, FLOOR, 1 / 0.65),
    Goal("int4 g128: 16 rows within 5 % of one", "int4 g128", (16, 16), ANY, ONE_ROW, 1.05),
    Goal("int8: 16 rows within 5 % of one", "int8", (16, 16), ANY, ONE_ROW, 1.05),
    Goal("int4 g128 2.8 x cuBLAS fp16 to 16 rows, from 30 MB", "int4 g128", (1, 16), LARGE, "cublas fp16", 1 / 2.8),
    Goal("int4 g128 2.6 x cuBLAS fp16 at 32 rows, from 30 MB", "int4 g128", (32, 32), LARGE, "cublas fp16", 1 / 2.6),
    Goal("int4 g128 2.0 x cuBLAS fp16 at 64 rows, from 30 MB", "int4 g128", (64, 64), LARGE, "cublas fp16", 1 / 2.0),
    Goal("int4 g128 1.2 x cuBLAS fp16 at 128 rows, from 30 MB", "int4 g128", (128, 128), LARGE, "cublas fp16", 1 / 1.2),
    Goal(
        "int4 g128 0.95 x cuBLAS fp16 at 256 rows, from 30 MB", "int4 g128", (256, 256), LARGE, "cublas fp16", 1 / 0.95
    ),
    Goal(
        "int4 g128 0.9 x cuBLAS fp16 from 512 rows, from 30 MB", "int4 g128", (512, MANY), LARGE, "cublas fp16", 1 / 0.9
    ),
    Goal("int8 1.75 x cuBLAS fp16 to 64 rows, from 30 MB", "int8", (1, 64), LARGE, "cublas fp16", 1 / 1.75),
    Goal("int8 1.3 x cuBLAS fp16 at 128 rows, from 30 MB", "int8", (128, 128), LARGE, "cublas fp16", 1 / 1.3),
    Goal("int8 0.95 x cuBLAS fp16 from 256 rows, from 30 MB", "int8", (256, MANY), LARGE, "cublas fp16", 1 / 0.95),
    Goal("int8 g128 within 5 % of per-channel to 16 rows", "int8 g128", (1, 16), ANY, "int8", 1.05),
    Goal("int8 g128 within 10 % of per-channel at 2048 rows", "int8 g128", (2048, 2048), ANY, "int8", 1.10),
    Goal("int4 g128 2.0 x cuBLAS fp16 to 16 rows, up to 16 MB", "int4 g128", (1, 16), SMALL, "cublas fp16", 1 / 2.0),
    Goal("a8w8 1.5 x cuBLAS bf16 from 512 rows", "a8w8", (512, MANY), ANY, "cublas bf16", 1 / 1.5),
    Goal("a8w8 within 5 % of int_mm from 512 rows", "a8w8", (512, MANY), ANY, "torch int_mm", 1.05),
    Goal("a8w8 g128 within 10 % of per-channel from 512 rows", "a8w8 g128", (512, MANY), ANY, "a8w8", 1.10),
    Goal("float zeros within 2 % of central ones", "int4 g128", (1, MANY), ANY, "int4 g128 symmetric", 1.02),
)


@dataclass(frozen=True)
class Judgement:
    """A goal on one layer at one m, in microseconds."""

    layer: str
    m: int
    took: float
    limit: float

    @property
    def met(self) -> bool:
        return self.took <= self.limit


def judge(timings: Sequence[Mapping[str, Any]]) -> dict[str, list[Judgement]]:
    """Each goal by its name, wherever its kernel and its reference were timed; what is furthest from it first."""
    by_place = {(t["kernel"], t["layer"], t["m"]): t for t in timings}
    return {goal.name: sorted(verdicts(goal, by_place), key=lambda v: -v.took / v.limit) for goal in GOALS}


def verdicts(goal: Goal, by_place: Mapping[tuple[str, str, int], Mapping[str, Any]]) -> Iterator[Judgement]:
    for (kernel, layer, m), timing in by_place.items():
        one = by_place.get((kernel, layer, 1))
        if kernel != goal.kernel or one is None or not goal.rows[0] <= m <= goal.rows[1]:
            continue
        if not goal.size[0] <= one["bytes"] <= goal.size[1]:
            continue
        reference = {FLOOR: timing["floor_us"], ONE_ROW: one["median"]}.get(goal.reference)
        if reference is None and (other := by_place.get((goal.reference, layer, m))):
            reference = other["median"]
        if reference is not None:
            yield Judgement(layer, m, timing["median"], goal.factor * reference + goal.extra)


def goal_table(judged: Mapping[str, Sequence[Judgement]]) -> list[str]:
    """A line for each goal: met, missed or not measured, how often, and where it is furthest from its limit."""
    lines = []
    for name, here in judged.items():
        if not here:
            lines.append(f"not measured  {name}")
            continue
        worst = here[0]
        word = "met" if worst.met else "MISSED"
        place = f"{sum(v.met for v in here)} of {len(here)}; {worst.layer} m={worst.m}"
        lines.append(f"{word:12}  {name}: {place} took {worst.took:.2f} us, limit {worst.limit:.2f}")
    return lines
