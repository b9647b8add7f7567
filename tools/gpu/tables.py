"""What a person reads of the measurements: pure functions of OUT.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from instantrt.tools.gpu import goals, ncu, predictions
from instantrt.tools.gpu.layers import QUICK_ROWS

Row = Mapping[str, Any]
Part = dict[str, Any]  # of the report, by one stage
CUBLAS = "cublas fp16"  # with which the others are compared
LONG = 100  # lines


def is_eight_bits(kernel: str) -> bool:
    """Whether it multiplies int8 or fp8, which tensor cores do at one rate."""
    return kernel.startswith(("a8", "torch int_mm", "torch scaled_mm"))


def is_ours(kernel: str) -> bool:
    return kernel.startswith(("int4", "int8", "a8"))


def speedups(timings: Sequence[Row], kernel: str, m: int) -> list[float]:
    """How many times as fast as CUBLAS a kernel is, for each layer on which both were timed."""
    took = {(t["layer"], t["kernel"]): t["median"] for t in timings if t["m"] == m}
    return [took[at, CUBLAS] / us for (at, name), us in took.items() if name == kernel and (at, CUBLAS) in took]


def mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def common_rows(timings: Sequence[Row]) -> list[int]:
    """The numbers of rows of x that every report has, where this one has them."""
    ms = sorted({t["m"] for t in timings})
    return [m for m in ms if m in QUICK_ROWS] or ms


def with_floor(timing: Row, roof: Mapping[str, float]) -> dict[str, Any]:
    """A timing and what its bytes or operations take at the measured rates, in microseconds."""
    operations = timing["flops"] / roof["int8_ops_per_us" if is_eight_bits(timing["kernel"]) else "bf16_ops_per_us"]
    floor = max(timing["bytes"] / roof["read_bytes_per_us"], operations)
    return {**timing, "floor_us": floor, "fraction": floor / timing["median"]}


def losses(tuned: Sequence[Row]) -> list[dict[str, Any]]:
    """What the table's choice loses to the best row, for each format, layer and m; the worst first."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in tuned:
        if "us" in row:
            groups.setdefault((row["format"], row["layer"], row["m"]), []).append(row)
    result = []
    for (name, layer, m), rows in groups.items():
        best, chosen = min(rows, key=lambda r: r["us"]), next((r for r in rows if r["chosen"]), None)
        took = chosen or {"plan": "not run", "us": float("nan")}
        loss = took["us"] / best["us"] - 1
        result.append(
            {"format": name, "layer": layer, "m": m, "chosen": took["plan"], "chosen_us": took["us"],
             "best": best["plan"], "best_us": best["us"], "loss": loss}
        )  # fmt: skip
    return sorted(result, key=lambda r: -math.inf if math.isnan(r["loss"]) else -r["loss"])


def tune_table(tuned: Sequence[Row]) -> list[str]:
    lines = [f"{'format':10} {'layer':17} {'m':>5}  {'chosen':18} {'us':>8}  {'best':18} {'us':>8}  loss"]
    lines += [
        f"{r['format']:10} {r['layer']:17} {r['m']:5}  {r['chosen']:18} {r['chosen_us']:8.2f}  "
        f"{r['best']:18} {r['best_us']:8.2f} {r['loss']:5.0%}"
        for r in losses(tuned)
    ]
    wrong = [f"WRONG {r['format']} {r['layer']} m={r['m']} {r['plan']}: {r['wrong']}" for r in tuned if "wrong" in r]
    return wrong + lines


def time_table(timings: Sequence[Row]) -> list[str]:
    """Microseconds of everybody, a line for each layer and kernel, a column for each m."""
    ms = sorted({t["m"] for t in timings})
    lines = [f"{'us':38}" + "".join(f"{m:>9}" for m in ms)]
    for layer, kernel in dict.fromkeys((t["layer"], t["kernel"]) for t in timings):
        row = {t["m"]: t["median"] for t in timings if (t["layer"], t["kernel"]) == (layer, kernel)}
        cells = "".join(f"{row[m]:9.2f}" if m in row else " " * 9 for m in ms)
        lines.append(f"{layer:17} {kernel:20}{cells}")
    return lines


def roof_table(roof: Row) -> list[str]:
    rates = {name: value for name, value in roof.items() if isinstance(value, float) and name.endswith("per_us")}
    lines = [f"{name.removesuffix('_per_us'):18} {value / 1e6:10.3f} T/s" for name, value in rates.items()]
    lines += [
        f"read {mb:>3} MB a node    {value / 1e6:10.3f} TB/s" for mb, value in roof["read_bytes_per_us_by_mb"].items()
    ]
    return [*lines, f"empty node         {roof['empty_node_us']:10.3f} us"]


def text(name: str, part: Part, most: int = 10**6) -> str:
    """What a person reads of one stage: no long table, and no more lines of the others, than `most`."""
    lines = [f"== {name}: {'passed' if part['passed'] else 'FAILED'} in {part['seconds']} s {part.get('counts', '')}"]
    lines += grouped(part.get("failures", {}))[:most]
    lines += [f"  {who}: {line}" for who, said in part.get("found", {}).items() for line in said[:12]]
    if part.get("errors"):
        row = max(part["errors"], key=part["errors"].__getitem__)
        lines.append(f"  largest relative error before the output's rounding: {part['errors'][row]:.2g}, {row}")
    if part.get("hung_rows"):
        lines.append(f"  later stages leave out: {', '.join(part['hung_rows'])}")
    if "timings" in part:
        lines += sorted({f"  {case.split(', ')[1]}: {why}" for case, why in part["absent"].items()})[:most]
        lines += time_table(part["timings"])[:most] if most > LONG else []
    lines += [f"  {name}: {answer}" for name, answer in part.get("facts", {}).items()]
    if "roofs" in part:
        lines += [*roof_table(part["roofs"]), *goals.goal_table(goals.judge(part["timings"]))]
    if "profiled" in part:
        lines += [*ncu.table(part["profiled"])[:most], f"  every counter: {part['raw']}"]
    if "predictions" in part:
        lines += predictions.comparison_table(part["predictions"])[:most]
    if "rows" in part:
        lines += tune_table(part["rows"])[:most]
        lines += [f"  measured choices: {part['choices']}"] if "choices" in part else []
    return "\n".join(lines)


def grouped(failures: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the cases that have it: how many, and the first."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for case, why in failures.items():
        first, *_, last = [line.strip() for line in why.splitlines() if line.strip()] * 2
        reasons[first if last == first else f"{first} ... {last}"].append(case)
    return [
        f"  {cases[0]}{f' and {len(cases) - 1} more' if len(cases) > 1 else ''}: {reason}"
        for reason, cases in reasons.items()
    ]
