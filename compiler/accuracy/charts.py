"""The pictures of a report, drawn once: SVG for the page, one PNG for whoever cannot show it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instantrt.compiler.accuracy.layer_errors import LayerError
from instantrt.passes.core.lazy import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
LABELS = 60  # more layers than this and only some are named below the axis
SMALLEST = 1e-9  # where a logarithmic axis ends
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "instantrt",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Colours that stay apart for colour-blind readers (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"


@dataclass(frozen=True)
class KlHistogram:
    """Tokens by their KL, in bins of equal width on a logarithmic axis."""

    edges: list[float]
    counts: list[int]


def kl_histogram(kl: Array) -> KlHistogram:
    clipped = np.maximum(kl[np.isfinite(kl)], SMALLEST)
    low, high = np.log10(clipped.min()), np.log10(clipped.max())
    edges = np.logspace(np.floor(low), np.ceil(max(high, low + 1)), BINS + 1)
    counts, _ = np.histogram(clipped, edges)
    return KlHistogram([float(e) for e in edges], [int(c) for c in counts])


def draw(rows: Sequence[LayerError], histogram: KlHistogram | None, png: Path, what: str) -> dict[str, str]:
    """Title -> SVG of every picture; all of them together go to `png`, under the name of `what` they show."""
    import matplotlib
    from matplotlib.figure import Figure

    pictures: dict[str, Callable[[Axes], None]] = {
        "Error of each layer": lambda axes: errors(axes, rows),
        "Size of each layer": lambda axes: sizes(axes, rows),
    }
    if histogram is not None:
        pictures["KL of each token"] = lambda axes: tokens(axes, histogram)
    svg = {}
    with matplotlib.rc_context(STYLE):
        for title, plot in pictures.items():
            figure = Figure(figsize=(11, 4.2), layout="constrained")
            plot(figure.subplots())
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            svg[title] = text.getvalue()[text.getvalue().index("<svg") :]
        figure = Figure(figsize=(11, 4.2 * len(pictures)), layout="constrained")
        for axes, (title, plot) in zip(figure.subplots(len(pictures), 1), pictures.items(), strict=True):
            plot(axes)
            axes.set_title(title, loc="left", fontweight="bold")
        figure.suptitle(what, fontsize=12, fontweight="bold")
        figure.savefig(png, dpi=110, metadata={"Software": None})
    return svg


def errors(axes: Axes, rows: Sequence[LayerError]) -> None:
    """Both kinds of error, a point a layer."""
    series: tuple[tuple[str, str, Any], ...] = (
        ("quantization: piled up so far", ORANGE, [r.piled_up for r in rows]),
        ("quantization: added by this layer", BLUE, [r.added for r in rows]),
        ("lowering: artifact against twin", GREEN, [r.lowering for r in rows]),
    )
    for label, colour, values in series:
        points = np.array([np.nan if not v else max(v, SMALLEST) for v in values], float)
        if np.isfinite(points).any():
            axes.plot(points, marker="o", markersize=3.5, linewidth=1, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("relative L2 error of the output")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    above(axes)
    name_layers(axes, rows)


def sizes(axes: Axes, rows: Sequence[LayerError]) -> None:
    at = np.arange(len(rows))
    axes.bar(at - 0.2, [r.bytes_before / 1e6 for r in rows], 0.4, color=GREY, label="before")
    axes.bar(at + 0.2, [r.bytes_after / 1e6 for r in rows], 0.4, color=BLUE, label="after")
    axes.set_ylabel("MB")
    above(axes)
    name_layers(axes, rows)


def above(axes: Axes) -> None:
    """The legend in one line above the picture, at the right: the title is at the left, the data below."""
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def tokens(axes: Axes, histogram: KlHistogram) -> None:
    axes.stairs(histogram.counts, histogram.edges, fill=True, color=BLUE)
    axes.set_xscale("log")
    axes.set_xlabel("KL(float || quantized) of the next token, nats")
    axes.set_ylabel("tokens")


def name_layers(axes: Axes, rows: Sequence[LayerError]) -> None:
    step = -(-len(rows) // LABELS)
    at = range(0, len(rows), step)
    axes.set_xticks(list(at), [rows[i].layer.removeprefix("model.layers.") for i in at], rotation=90, fontsize=7)
    axes.set_xlim(-0.7, len(rows) - 0.3)
