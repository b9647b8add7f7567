"""The report: one self-contained HTML file, the same pictures as PNG, and the same numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from instantrt.compiler.accuracy.charts import KlHistogram, draw, kl_histogram
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.metrics import Tokens
from instantrt.compiler.accuracy.verify import Verdict
from instantrt.passes.core.lazy import Array

CONTEXT = 12  # tokens before a bad prediction that are shown with it
WORST = 15
# What the columns of the two tables say.
COMPARED = {
    "kind": "quantization: what the user pays; lowering: rounding alone, which the arithmetic bounds",
    "form, against": "float: the model; twin: quantized, in plain ONNX; artifact, lowered: what the target runs",
    "relative L2": "size of the difference of the outputs, as a part of their size",
    "largest": "largest difference of one output value",
    "bound": "what the arithmetic explains of relative L2; beyond it something is wrong",
    "arithmetic": "what the bound is for: the least exact arithmetic of the form",
}
LAYERS = {
    "MB before, after": "of the layer's weights: as stored, and with codes, scales and zero points",
    "weights": "relative L2 error of the quantized weights",
    "steps": "largest error of a weight, in steps of its scale; rounding explains 1. None where inputs decide codes",
    "added": "relative L2 error of the layer's output on the float model's own input",
    "piled up": "the same on the quantized model's input: what all layers so far have caused together",
    "lowering": "relative L2 error of the lowered layer's worst output channel against the twin on the same input",
    "probe": "error of the lowered layer's worst weight against the twin, seen through one-hot inputs",
    "arithmetic": "what runs the lowered layer",
}
# Figures of twin against float -> what a card calls them, and how it writes them.
CARDS = {
    "perplexity_reference": ("perplexity, float", "{:.5g}"),
    "perplexity": ("perplexity, quantized", "{:.5g}"),
    "perplexity_ratio": ("ratio", "{:.5f}"),
    "kl_mean": ("mean KL, nats", "{:.3g}"),
    "kl_p99": ("99 % of tokens below", "{:.3g}"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "top5_agreement": ("top-5 agreement", "{:.2%}"),
    "cosine_min": ("smallest cosine", "{:.5f}"),
    "cosine_mean": ("mean cosine", "{:.5f}"),
    "rank_agreement": ("rank agreement of pairs", "{:.4f}"),
    "label_agreement": ("same label", "{:.2%}"),
}
JSON, HTML, PNG = "report.json", "report.html", "report.png"


@dataclass(frozen=True)
class WorstToken:
    """A position where the twin disagrees most with the float model about what comes next."""

    position: int
    kl: float
    context: str
    float_next: str
    twin_next: str
    text_next: str


def write_report(verdict: Verdict, folder: Path) -> Path:
    """Writes report.html, report.png and report.json into `folder`; returns the page."""
    worst = worst_tokens(verdict.tokens, verdict.data) if verdict.tokens is not None else []
    histogram = kl_histogram(verdict.tokens.kl) if verdict.tokens is not None else None
    what = f"{verdict.about['model']} for {verdict.target}"
    pictures = draw(verdict.layer_errors.rows, histogram, folder / PNG, what)
    (folder / JSON).write_text(json.dumps(numbers(verdict, worst, histogram), indent=1) + "\n", "utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    page = environment.get_template("report.html.j2").render(
        verdict=verdict,
        pictures=pictures,
        worst=worst,
        compared=COMPARED,
        layers=LAYERS,
        cards=cards(verdict.figures),
        megabytes=lambda size: f"{size / 1e6:,.2f}",
    )
    (folder / HTML).write_text(page, "utf-8")
    return folder / HTML


def cards(figures: Mapping[str, float]) -> dict[str, str]:
    """What there is of CARDS, as a reader sees it."""
    return {title: form.format(figures[key]) for key, (title, form) in CARDS.items() if key in figures}


def number(value: float | None) -> str:
    """Three digits, as short as they can be; a dash where there is nothing."""
    return "-" if value is None else f"{value:.3g}"


def worst_tokens(tokens: Tokens, data: Data) -> list[WorstToken]:
    """The positions of the largest KL, with the text that leads to them."""
    rows = [row for batch in data.batches for row in batch]
    starts = np.cumsum([0, *(len(row) for row in rows)])
    found = []
    for flat in np.argsort(-tokens.kl, kind="stable")[:WORST]:
        index = int(np.searchsorted(starts, flat, side="right")) - 1
        found.append(worst_token(tokens, int(flat), rows[index], int(flat - starts[index]), data.decode))
    return found


def worst_token(tokens: Tokens, flat: int, row: Array, at: int, decode: Callable[[list[int]], str]) -> WorstToken:
    def text(ids: Array) -> str:
        return decode([int(i) for i in ids])

    return WorstToken(
        position=flat,
        kl=float(tokens.kl[flat]),
        context=text(row[max(0, at + 1 - CONTEXT) : at + 1]),
        float_next=text(tokens.best_reference[flat : flat + 1]),
        twin_next=text(tokens.best[flat : flat + 1]),
        text_next=text(row[at + 1 : at + 2]),
    )


def numbers(verdict: Verdict, worst: list[WorstToken], histogram: KlHistogram | None) -> dict[str, Any]:
    """Everything that the page shows; a number that is not finite is a string, as JSON has none."""
    body = {
        "target": verdict.target,
        "about": dict(verdict.about),
        "passed": verdict.passed,
        "violations": list(verdict.violations),
        "data": {"kind": verdict.data.kind, "warning": verdict.data.warning},
        "note": verdict.note,
        "comparisons": [asdict(c) | {"holds": c.holds} for c in verdict.comparisons],
        "quantization": dict(verdict.figures),
        "perplexity": dict(verdict.perplexities),
        "layers": [asdict(row) for row in verdict.layer_errors.rows],
        "not_finite": dict(verdict.layer_errors.first_bad),
        "kl_histogram": asdict(histogram) if histogram is not None else None,
        "worst_tokens": [asdict(w) for w in worst],
        "polygraphy": verdict.command,
    }
    cleaned: dict[str, Any] = finite(body)
    return cleaned


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
