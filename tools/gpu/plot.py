"""The plots of a report: times of everybody against M, a panel for each layer; and speed over cuBLAS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instantrt.tools.gpu.tables import common_rows, mean, speedups

Row = Mapping[str, Any]
STYLES = {  # name: colour, line; a colour for each width of weights, solid lines are ours; others are in the JSON only
    "int4 g128": ("tab:blue", "-"), "int8": ("tab:green", "-"), "a8w8": ("tab:red", "-"),
    "a8w4 g128": ("tab:purple", "-"), "humming int4": ("tab:blue", "--"), "triton int4": ("lightsteelblue", "--"),
    "torch int4pack bf16": ("tab:cyan", "--"), "humming int8": ("tab:green", "--"), "torch int_mm": ("tab:red", "--"),
    "torch scaled_mm fp8": ("tab:orange", "--"), "cublas fp16": ("black", "--"),
}  # fmt: skip
FLOORS = ("int4 g128", "int8", "cublas fp16")
TICKS = [first * 10**zeros for zeros in range(5) for first in (1, 2, 3, 5, 7)]  # microseconds
COLUMNS = 4
TOP, BARS = "int4 g128", {"int4 g128": "tab:blue", "humming int4": "tab:orange"}


def name_of(report: Mapping[str, Any]) -> str:
    return str(report.get("before", {}).get("name", ""))


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Microseconds; dotted is the floor of a format, what its bytes or operations take at the measured rates."""
    from matplotlib.figure import Figure

    timings = report["timings"]
    layers, ms = list(dict.fromkeys(t["layer"] for t in timings)), sorted({t["m"] for t in timings})
    columns, lines = min(COLUMNS, len(layers)), -(-len(layers) // COLUMNS)
    figure = Figure(figsize=(4.4 * columns + 0.4, 4.1 * lines + 1.6), layout="constrained")
    panels: Any = figure.subplots(lines, columns, squeeze=False)
    legend: dict[str, Any] = {}
    for panel, layer in zip(panels.flat, layers, strict=False):
        here = [t for t in timings if t["layer"] == layer]
        for kernel, (colour, line) in STYLES.items():
            points = sorted((t["m"], t["median"], t["floor_us"]) for t in here if t["kernel"] == kernel)
            if not points:
                continue
            m, took, floor = zip(*points, strict=True)
            ours = line == "-"
            style = {"marker": "o" if ours else "x", "markersize": 5 if ours else 4, "linewidth": 2 if ours else 1.2}
            drawn = panel.plot(m, took, color=colour, linestyle=line, zorder=2 + ours, **style)[0]
            legend[f"{'ours' if ours else 'peer'}: {kernel.replace('cublas', 'cuBLAS')}"] = drawn
            if kernel in FLOORS:
                (dots,) = panel.plot(m, floor, color=colour, linestyle=":", linewidth=1, zorder=1)
                legend[f"floor: {kernel.replace('cublas', 'cuBLAS')}"] = dots
        worst = max((t["median"] for t in here if not t["kernel"].startswith("triton")), default=1.0)
        panel.set_title(layer, fontsize=11)
        panel.set(xscale="log", yscale="log", ylim=(0.8 * min(t["floor_us"] for t in here), 1.3 * worst))
        panel.set_xticks(ms, [str(m) for m in ms], fontsize=8)
        low, high = panel.get_ylim()
        ticks = [t for t in TICKS if low <= t <= high]
        panel.set_yticks(ticks, [str(t) for t in ticks], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(layers) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("M, rows of x")
    figure.supylabel("microseconds")
    order = sorted(legend, key=lambda label: ("ours", "peer", "floor").index(label.partition(":")[0]))
    figure.legend(
        [legend[label] for label in order], order, loc="outside lower center", ncols=min(len(order), 7), frameon=False
    )
    figure.suptitle(f"{name_of(report)}: weight-only GEMM, medians of graph replays; lower is better")
    figure.savefig(path, dpi=100)


def speedup_plot(report: Mapping[str, Any], path: Path) -> None:
    """Bars of int4 g128 over cuBLAS fp16 for each M: all layers together, and each layer that humming was timed on."""
    from matplotlib.figure import Figure

    timings: Sequence[Row] = report["timings"]
    ms = common_rows(timings)
    peers = list(dict.fromkeys(t["layer"] for t in timings if t["kernel"] == "humming int4"))
    all_of = {m: speedups(timings, TOP, m) for m in ms}
    count = max(map(len, all_of.values()))
    means = {m: mean(ratios) for m, ratios in all_of.items()}
    label = f"ours, geometric mean of {count} layers; the line: slowest to fastest"
    sides: list[tuple[str, str, dict[int, float]]] = [(label, "lightsteelblue", means)]
    for layer, hatch in zip(peers, ("", "//", ".."), strict=False):
        for kernel, colour in BARS.items():
            who = "ours" if kernel == TOP else "humming"
            found = {m: r[0] for m in ms if (r := speedups([t for t in timings if t["layer"] == layer], kernel, m))}
            sides.append((f"{who}, {layer}", f"{colour}{hatch}", found))
    width = 0.84 / len(sides)
    figure = Figure(figsize=(max(7.5, 1.9 * len(ms)), 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (label, colour, ratios) in enumerate(sides):
        face = colour.rstrip("/.")
        x = [i + (number - (len(sides) - 1) / 2) * width for i, m in enumerate(ms) if m in ratios]
        y = [ratios[m] for m in ms if m in ratios]
        bars = axes.bar(x, y, width * 0.94, color=face, hatch=colour[len(face) :], edgecolor="white", label=label)
        axes.bar_label(bars, [f"{v:.2f}" if v < 1 else f"{v:.1f}" for v in y], fontsize=8, padding=2)
        if not number:
            low, high = ([end(all_of[m]) for m in ms] for end in (min, max))
            axes.vlines([at - 0.38 * width for at in x], low, high, color="gray", linewidth=1.5, zorder=3)
    axes.axhline(1, color="black", linewidth=1, linestyle="--", label="cuBLAS fp16")
    axes.set_xticks(range(len(ms)), [f"M = {m}" for m in ms])
    axes.set(ylabel="times as fast as cuBLAS fp16", title=f"{name_of(report)}: int4 weights in groups of 128")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
