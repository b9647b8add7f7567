"""The page of a report and its plots: OUT.md, OUT.png and OUT_speedup.png of OUT.json, whichever GPU wrote that.

    python -m instantrt.tools.gpu.page benchmarks/gpu/h200_control.json [--readme]

Why a goal was missed or a prediction was wrong is what a person found out: OUT.notes.json beside it has the text, by
the goal's name or by the prediction's, with or without its layer ("int4 g128 m=512, as they were"), and may have an
"about" and "next". What is far off and not explained is said on the page, and here. `--readme` also writes the line
of README.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from instantrt.tools.gpu import goals, ncu, tables
from instantrt.tools.gpu.plot import plot, speedup_plot
from instantrt.tools.gpu.predictions import FAR
from instantrt.tools.gpu.tables import CUBLAS
from instantrt.tools.gpu.words import parser
from instantrt.tools.markdown import head, row
from instantrt.tools.places import ROOT

Report = Mapping[str, Any]
CU, OURS = "cublas", ("int4 g128", "int8", "a8w8")
LOST, MOST_LOST = 0.05, 30  # of a choice, from which it is shown, and how many
LINE = re.compile(r"(?<=<!-- instantrt.tools.gpu.page -->\n).*?(?=<!-- end -->)", re.DOTALL)
SHOWN = "qwen2-7b gate_up"  # the layer of the README


def notes_of(path: Path) -> dict[str, Any]:
    """What a person wrote beside a report."""
    beside = path.with_suffix(".notes.json")
    notes: dict[str, Any] = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    return notes


def markdown(report: Report, notes: Mapping[str, Any], name: str) -> str:
    """The page of a report whose files are called `name`."""
    bench, parts = report.get("bench", {}), list[str]()
    timings = bench.get("timings", [])
    parts += [f"# {notes.get('title', report['before']['name'])}", *notes.get("about", [])]
    parts += [
        f"Written by `python -m instantrt.tools.gpu.page` from [{name}.json]({name}.json), which has every number."
    ]
    if timings and bench.get("roofs"):
        parts += [
            "## In short",
            f"![times as fast as cuBLAS]({name}_speedup.png)",
            "\n".join(mean_rows(timings)),
            MEANS,
        ]
        parts += ["## Times", TIMES, "\n".join(time_rows(timings))]
        parts += [f"![microseconds by layer]({name}.png)"]
        parts += ["## Goals", *goal_parts(timings, notes.get("goals", {}))]
    if bench.get("predictions"):
        parts += ["## What was predicted", *prediction_parts(bench["predictions"], notes.get("predictions", {}))]
    if notes.get("next"):
        parts += ["## Next", "\n".join(f"* {line}" for line in notes["next"])]
    if "tune" in report and report["tune"].get("rows"):
        parts += ["## What the table of configurations loses", *tune_parts(report["tune"]["rows"])]
    if report.get("profile", {}).get("profiled"):
        parts += ["## Counters", COUNTERS, "\n".join(counter_rows(report["profile"]["profiled"]))]
    if bench.get("roofs"):
        parts += ["## What the card does", "\n".join(roof_rows(bench["roofs"], bench.get("facts", {})))]
    parts += ["## The run", "\n".join(run_rows(report))]
    return "\n\n".join(parts) + "\n"


MEANS = """Times as fast as cuBLAS fp16 on the same layer: geometric mean of all layers on which both were timed, and in
parentheses the slowest and the fastest of them. *In turn* is without launches that begin before the one ahead of them
has ended."""

TIMES = """Microseconds, medians of graph replays with weights that are not in the L2 cache; in parentheses the speed
over cuBLAS fp16. The peer is the fastest of all others but cuBLAS that were timed there, whatever its format: fp8 and
int8 peers get activations that are quantized already, while a8w8 has that in its time."""

COUNTERS = """Nsight Compute, one launch each, caches flushed, clocks as they are: a launch takes longer here than in
the tables above. Stalls: cycles between two instructions of a warp, and their share."""


def mean_rows(timings: Sequence[tables.Row]) -> list[str]:
    """A line for each kernel that was timed on many layers, ours first."""
    ms = tables.common_rows(timings)
    kernels = dict.fromkeys(t["kernel"] for t in timings if t["kernel"] != CUBLAS)
    lines = head("", *(f"M = {m}" for m in ms))
    for kernel in sorted(kernels, key=lambda k: (not tables.is_ours(k), k.endswith(" in turn"))):
        each = [tables.speedups(timings, kernel, m) for m in ms]
        if not kernel.endswith(" again") and any(each):
            lines.append(row(kernel, *(spread(ratios) for ratios in each)))
    return lines


def spread(ratios: Sequence[float]) -> str:
    if len(ratios) < 2:
        return "".join(f"{ratio:.2f} (one layer)" for ratio in ratios)
    return f"{tables.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def time_rows(timings: Sequence[tables.Row]) -> list[str]:
    """A line for each layer and M; other M of a long report are in the JSON."""
    lines = head("layer", "M", *OURS, CUBLAS.replace("cublas", "cuBLAS"), "peer")
    took = {(t["layer"], t["m"], t["kernel"]): t["median"] for t in timings}
    for layer in dict.fromkeys(t["layer"] for t in timings):
        for m in tables.common_rows(timings):
            here = {kernel: us for (at, rows, kernel), us in took.items() if (at, rows) == (layer, m)}
            base = here.get(CUBLAS)
            cells = [against(here.get(kernel), base) for kernel in OURS]
            peers = {kernel: us for kernel, us in here.items() if not tables.is_ours(kernel) and CU not in kernel}
            best = min(peers, key=peers.__getitem__, default="")
            lines.append(row(layer, m, *cells, shown(base), f"{against(peers[best], base)} {best}" if best else ""))
    return lines


def shown(us: float | None) -> str:
    return "" if us is None else f"{us:.{2 if us < 10 else 1 if us < 100 else 0}f}"


def against(us: float | None, base: float | None) -> str:
    return "" if us is None else f"{shown(us)} ({base / us:.2f}x)" if base else shown(us)


def goal_parts(timings: Sequence[tables.Row], causes: Mapping[str, str]) -> list[str]:
    by_goal = goals.judge(timings)
    lines = head("goal", "met", "furthest from it", "took", "limit", "cause")
    for name, here in sorted(by_goal.items(), key=lambda item: all(v.met for v in item[1])):  # missed ones first
        if here:
            worst, met = here[0], sum(v.met for v in here)
            place = f"{worst.layer}, M = {worst.m}"
            count = f"{met} of {len(here)}" if met < len(here) else f"**all {met}**"
            cause = causes.get(name, "") if met < len(here) else ""
            lines.append(row(name, count, place, shown(worst.took), shown(worst.limit), cause))
    absent = [name for name, here in by_goal.items() if not here]
    return ["Times in microseconds.", "\n".join(lines), *([f"Not measured: {'; '.join(absent)}."] if absent else [])]


def keys(found: Mapping[str, Any]) -> tuple[str, str]:
    """By which a prediction's explanation is found."""
    tail = f"m={found['m']}, {found['of']}"
    return f"{found['kernel']} {found['layer']} {tail}", f"{found['kernel']} {tail}"


def unexplained(report: Report, notes: Mapping[str, Any]) -> list[str]:
    """Predictions that were far off and that nobody has explained."""
    known = notes.get("predictions", {})
    found = report.get("bench", {}).get("predictions", [])
    return [keys(p)[0] for p in found if abs(p["off"]) > FAR and not any(key in known for key in keys(p))]


def prediction_parts(found: Sequence[Mapping[str, Any]], why: Mapping[str, str]) -> list[str]:
    """A line for each prediction, a letter for each explanation."""
    letters: dict[str, str] = {}
    lines = head("kernel", "layer", "M", "of", "predicted", "measured", "off", "why")
    for p in found:
        low, high = p["predicted"]
        text = next((why[key] for key in keys(p) if key in why), "")
        note = letters.setdefault(text, f"[{len(letters) + 1}]") if text else ""
        if abs(p["off"]) > FAR and not note:
            note = "**not explained**"
        expected = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        off = f"**{p['off']:+.0%}**" if abs(p["off"]) > FAR else f"{p['off']:+.0%}" if p["off"] else "in it"
        lines.append(
            row(p["kernel"], p["layer"], p["m"], p["of"], f"{expected} {p['unit']}", f"{p['measured']:.2f}", off, note)
        )
    said = "  \n".join(f"{number} {text}" for text, number in letters.items())
    about = f"Before the first run. *Off* is the distance from the nearer end of the range; over {FAR:.0%} is bold."
    return [about, "\n".join(lines), *([said] if said else [])]


def tune_parts(rows: Sequence[tables.Row]) -> list[str]:
    lost = [r for r in tables.losses(rows) if not r["loss"] <= LOST]
    lines = head("format", "layer", "M", "chosen", "us", "best", "us", "loss")
    lines += [
        row(
            r["format"],
            r["layer"],
            r["m"],
            r["chosen"],
            shown(r["chosen_us"]),
            r["best"],
            shown(r["best_us"]),
            f"{r['loss']:.0%}",
        )
        for r in lost[:MOST_LOST]
    ]
    total = len(tables.losses(rows))
    about = f"{len(lost)} of {total} choices lose more than {LOST:.0%} to the best row."
    return [about, "\n".join(lines)] if lost else [about]


def counter_rows(profiled: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = head("case", "kernel", *(c.name for c in ncu.COUNTERS), "stalls")
    return lines + [row(r["case"], f"`{ncu.short(r['kernel'])}`", *ncu.cells(r)) for r in profiled]


def roof_rows(roof: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    lines = head("what", "measured")
    names = {
        "read_bytes": "pure read, 4 GB",
        "copy_bytes": "copy",
        "bf16_ops": "bf16 products, cuBLAS",
        "int8_ops": "int8 products, cuBLAS",
    }
    for key, name in names.items():
        if (rate := roof.get(f"{key}_per_us")) is not None:
            unit = "TB/s" if key.endswith("bytes") else "T operations/s"
            lines.append(row(name, f"{rate / 1e6:.{2 if unit == 'TB/s' else 0}f} {unit}"))
    lines += [
        row(f"read of {mb} MB in a node of a graph", f"{rate / 1e6:.2f} TB/s")
        for mb, rate in roof.get("read_bytes_per_us_by_mb", {}).items()
    ]
    if "empty_node_us" in roof:
        lines.append(row("empty node of a graph", f"{roof['empty_node_us']:.2f} us"))
    for name, answer in facts.items():
        values = answer.items() if isinstance(answer, dict) else [("", answer)]
        lines += [
            row(f"{name}{f': {key}' if key else ''}", f"{v:.3g}" if isinstance(v, float) else v) for key, v in values
        ]
    return lines


def run_rows(report: Report) -> list[str]:
    before, after = report["before"], report.get("after", {})
    lines = [
        f"* commit `{report['commit'][:12]}{'-dirty' if report['commit'].endswith('-dirty') else ''}`, sources "
        f"`{report['sources']}`: a digest of what is measured",
        f"* {before['name']}, driver {before.get('driver_version')}, at most {before.get('clocks.max.sm')} MHz, memory "
        f"{before.get('clocks.max.mem')} MHz, {before.get('power.limit')} W; torch {report.get('torch')}",
        f"* idle before and after: {before.get('clocks.sm')} and {after.get('clocks.sm', '?')} MHz, "
        f"{before.get('temperature.gpu')} and {after.get('temperature.gpu', '?')} C",
    ]
    for name, part in report.items():
        if isinstance(part, dict) and "passed" in part:
            counts = ", ".join(f"{n} {what}" for what, n in part.get("counts", {}).items())
            said = f"* {name}: {'passed' if part['passed'] else '**FAILED**'} in {part['seconds']} s"
            worst = max(part.get("errors", {}).values(), default=0.0)
            error = f"; largest relative error before the output's rounding {worst:.2g}" if worst else ""
            lines.append(said + (f": {counts}" if counts else "") + error)
    return lines


def headline(report: Report, name: str) -> str:
    """What the README says of a report."""
    timings = report["bench"]["timings"]
    ms = [m for m in tables.common_rows(timings) if tables.speedups(timings, OURS[0], m)]
    ratios = {m: tables.speedups(timings, OURS[0], m) for m in ms}
    said = ", ".join(f"{tables.mean(r):.2f} at M = {m}" for m, r in ratios.items())
    one = {t["kernel"]: t["median"] for t in timings if (t["layer"], t["m"]) == (SHOWN, 1)}
    others = "".join(
        f", {who} {one[k]:.1f}" for k, who in ((CUBLAS, "cuBLAS fp16"), ("humming int4", "humming")) if k in one
    )
    card, layers = report["before"]["name"], max(map(len, ratios.values()))
    text = (
        f"* **GPU kernels, timed on an {card}.** The plugin's 4-bit product (groups of 128) beside cuBLAS fp16, "
        f"geometric mean of {layers} layers of known models, times as fast: {said}. Qwen2-7B's gate and up at M = 1: "
        f"{one[OURS[0]]:.1f} us{others} ([measured](benchmarks/gpu/{name}.md), with what was missed and why)."
    )
    return fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) + "\n"


def write(path: Path) -> None:
    """The page beside a report, and its plots."""
    report, notes = json.loads(path.read_text("utf-8")), notes_of(path)
    path.with_suffix(".md").write_text(markdown(report, notes, path.stem), "utf-8")
    if report.get("bench", {}).get("roofs"):
        flat = {**report, **report["bench"]}
        plot(flat, path.with_suffix(".png"))
        speedup_plot(flat, path.with_name(f"{path.stem}_speedup.png"))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("report", type=Path)
    options.add_argument("--readme", action="store_true", help="write README.md's line, too")
    args = options.parse_args()
    write(args.report)
    report = json.loads(args.report.read_text("utf-8"))
    for name in unexplained(report, notes_of(args.report)):
        print(f"not explained: {name}")
    if args.readme:
        readme = ROOT / "README.md"
        line = headline(report, args.report.stem)
        readme.write_text(LINE.sub(lambda _: line, readme.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
