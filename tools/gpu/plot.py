"""The roofline plot of a report: time over floor against M, a panel for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

STYLES = {  # name: colour, line; a colour for each format, solid lines are ours; who is not here is in the JSON only
    "int4 g128": ("tab:blue", "-"), "int4 g128 bf16": ("tab:cyan", "-"), "int4 g128 rounded": ("navy", "-"),
    "int8": ("tab:green", "-"), "int8 g128": ("yellowgreen", "-"), "a8w8": ("tab:red", "-"),
    "a8w8 g128": ("tab:orange", "-"), "a8w4 g128": ("tab:purple", "-"), "cublas fp16": ("black", "--"),
    "cublas bf16": ("tab:gray", "--"), "torch int4pack bf16": ("tab:cyan", "--"), "torch int_mm": ("tab:red", "--"),
    "humming int4": ("tab:blue", "--"), "humming int8": ("yellowgreen", "--"),
    "triton int4": ("tab:pink", "--"), "torch scaled_mm fp8": ("tab:orange", "--"),
}  # fmt: skip
MULTIPLES = (1, 1.5, 2, 3, 5, 8)
COLUMNS = 4


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Each kernel is over the floor of its own format: two formats at one height do not take the same time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timings = report["timings"]
    layers, ms = list(dict.fromkeys(t["layer"] for t in timings)), sorted({t["m"] for t in timings})
    columns, lines = min(COLUMNS, len(layers)), -(-len(layers) // COLUMNS)
    size = (4.4 * columns + 0.4, 3.9 * lines + 1.4)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    legend: dict[str, Any] = {}
    for panel, layer in zip(panels.flat, layers, strict=False):
        for kernel, (colour, line) in STYLES.items():
            here = [
                (t["m"], t["median"] / t["floor_us"]) for t in timings if (t["layer"], t["kernel"]) == (layer, kernel)
            ]
            if here:
                x, y = zip(*sorted(here), strict=True)
                style = {"linestyle": line, "marker": "o" if line == "-" else "x", "markersize": 4, "linewidth": 1.4}
                (legend[kernel],) = panel.plot(x, y, color=colour, **style)
        panel.set_title(layer, fontsize=11)
        panel.set(xscale="log", yscale="log", ylim=(0.93, MULTIPLES[-1]))
        panel.set_xticks(ms, [str(m) for m in ms], fontsize=8, rotation=60)
        panel.set_yticks(MULTIPLES, [f"{y:g}" for y in MULTIPLES])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(layers) :]:
        panel.set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("M, rows of x")
    figure.supylabel("time / floor of its own format")
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=2 * columns, frameon=False)
    where = report.get("before", {}).get("name", "")
    figure.suptitle(f"{where}: WeightOnlyGemm (solid) and peers (dashed): medians of graph replays")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
