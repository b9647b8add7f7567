"""What a format costs and brings: `instantrt bench formats frontier MODEL` writes benchmarks/frontier.json, .md, .png.

Every choice of format, group size, search, budget and cache type (the table FRONTIER of cpu_contests.py), measured as
`instantrt bench cpu` does; the page, which says what to choose, is made of the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from instantrt.tools.bench.cpu import folder_for, measured_model, pythons_of
from instantrt.tools.bench.cpu_contests import (
    ASKED,
    CALIBRATION,
    EIGHT,
    FITTED,
    FLOAT,
    FLOAT_ZEROS,
    FOUR,
    FRONTIER,
    PLUGIN,
    WITH_KERNELS,
)
from instantrt.tools.bench.cpu_page import MIB, ahead, bubbles, notes, speed_cell
from instantrt.tools.bench.results import Result, keep, known
from instantrt.tools.markdown import table
from instantrt.tools.places import BENCHMARKS, TEXT

OUT = BENCHMARKS / "frontier.json"
OPTIONS = {name: f"`{words.replace(CALIBRATION, 'FILE')}`" for name, words in (ASKED | FITTED | WITH_KERNELS).items()}


def main(
    model: Annotated[Path, typer.Argument(help="folder of a float causal LM that takes 1056 tokens")],
    text: Annotated[Path, typer.Option(help="English in UTF-8")] = TEXT,
    calibration: Annotated[Path | None, typer.Option(help="another text, for calibrated formats")] = None,
    llama: Annotated[Path | None, typer.Option(help="a python that has llama-cpp-python and gguf")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    scratch: Annotated[Path | None, typer.Option(help="keeps what peers made, for the next run")] = None,
    out: Annotated[Path, typer.Option(help="the JSON; .md and .png go beside it")] = OUT,
) -> None:
    """Write loss, bytes and decode speed of every format; the files keep the last results of other models."""
    results, pythons = known(out), pythons_of(llama=llama, calibration=calibration and Path(sys.executable))
    name = model.absolute().name
    with folder_for(name, scratch) as folder:
        found = measured_model("frontier", model, model, [text], folder, pythons, rounds, calibration=calibration)
        results[name] = found | {"text": text.name, "calibration": calibration and calibration.name}
    keep(out, results, markdown(results))
    plot(results, out.with_suffix(".png"))


PICKS = {
    "the float model's answers at half of bfloat16's bytes; the default": EIGHT,
    "8 bits that change least": "8 bits by channel, exact",
    "long contexts, or many at once: a quarter of the cache's bytes": "8 bits, int8 cache",
    "the smallest cache: a sixth of its bytes": "8 bits, uint4 cache",
    "4 bits, no questions asked": FOUR,
    "the best file of a given size": "6.2 bits a weight",
    "the same, with a text like those that it will read": "6.2 bits a weight, calibrated",
    "the smallest file": "4 bits g64",
}
TITLES = ("you want", "ask for", "loss", "KL", "MiB", "tokens a second after 128, 1,024", "with kernels of ours")

ABOUT = f"""What a causal LM loses by a format, and what that brings, on a CPU. Written by `instantrt bench formats
frontier`. What a GPU runs has the same weights where it is asked for the same formats: its losses are these, its speeds
are in [On GPUs](gpu/README.md).

Loss is in nats a token over a text, in windows of 512 tokens, here above that of the float32 artifact. A text of two
thousand tokens says of two losses which is less where they are 0.01 apart; KL, the mean divergence of the next token's
distribution from float32's, in nats, says more. A cache of integers is what every token of a window sees. MiB are of
weights and graph on disk; speeds are tokens a second of two threads, medians of rounds in which all take turns, and
behind them their ratio to 8 bits within a round, with quartiles.

[Quantization](../quantization.md) says what the options are, [CPU beside its peers](cpu.md) has the memory, long
prompts, batches and encoders. Kernels of ours are what `--plugin auto` adds
([x86](../targets/x86.md#kernels-of-ours)); their cache is float16 where nothing is said. `{FLOAT_ZEROS.name}` lies in
`examples`. llama.cpp's files are made of the same weights, its cache is float16. In the plot a bubble's area is the
speed; ours are blue, or green where a text was given, and run without those kernels. No other file is both smaller and
better than one on the line.

A checkpoint that was in four bits once, as a GGUF file's weights were, has them on a grid. A copy with outliers keeps
most of it, since they are powers of two, and a form that meets that grid again (float zero points, of Q4_1) loses next
to nothing there, which says nothing of other models; a regridded copy has none."""


def markdown(results: Mapping[str, Result]) -> str:
    lines = ["# Choosing a format", "", ABOUT, "", "![KL to float32 against size](frontier.png)", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", *table(TITLES, choices(result))]
        titles = ("", "asked for", "loss over float32's", "KL", "MiB", *FRONTIER.rounds)
        lines += ["", *table(titles, sides_by_kl(result)), "", *notes(result), ""]
    return "\n".join(lines)


def choices(result: Result) -> Iterator[tuple[str, ...]]:
    sides = result["sides"]
    for want, name in PICKS.items():
        if (side := sides.get(name)) is not None:
            size = f"{side['bytes'] / MIB:.0f}"
            rates = speeds(side), speeds(sides.get(f"{name}{PLUGIN}"))
            yield want, OPTIONS[name], loss(sides, name), f"{side['kl']:.4f}", size, *rates


def speeds(side: Result | None) -> str:
    return ", ".join(f"{np.median(values):.3g}" for values in side["rounds"].values()) if side is not None else ""


def sides_by_kl(result: Result) -> Iterator[tuple[str, ...]]:
    """Of every side, the best first."""
    sides = result["sides"]
    for name in sorted(sides, key=lambda name: sides[name]["kl"]):
        speeds = (speed_cell(FRONTIER, sides, name, measure) for measure in FRONTIER.rounds)
        about = name, OPTIONS.get(name, ""), loss(sides, name), f"{sides[name]['kl']:.4f}"
        yield *about, f"{sides[name]['bytes'] / MIB:.1f}", *speeds


def loss(sides: Mapping[str, Result], name: str) -> str:
    base = sides[FLOAT]["loss"]
    return f"{base:.4f} itself" if name == FLOAT else f"{sides[name]['loss'] - base:+.4f}"


def plot(results: Mapping[str, Result], path: Path) -> None:
    """KL to float32 against MiB, tokens a second as a bubble's area; the line joins those that none beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6 * len(results)), layout="constrained")
    for axes, (name, result) in zip(np.atleast_1d(figure.subplots(len(results))), results.items(), strict=True):
        base = result["sides"][FLOAT]
        sides = {each: side for each, side in result["sides"].items() if each not in {FLOAT, *WITH_KERNELS}}
        size = [side["bytes"] / MIB for side in sides.values()]
        kl = [side["kl"] for side in sides.values()]
        speed = [float(np.median(side["rounds"][FRONTIER.speed])) for side in sides.values()]
        areas = [500 * each / max(speed) for each in speed]
        colors = ["C0" if each in ASKED else "C2" if each in FITTED else "C1" for each in sides]
        labels = [f"{each}: {rate:.3g} tokens/s" for each, rate in zip(sides, speed, strict=True)]
        bubbles(axes, (size, kl), areas, colors, labels, ahead([-each for each in size], kl))
        about = f"float32: {base['bytes'] / MIB:.0f} MiB, {np.median(base['rounds'][FRONTIER.speed]):.3g} tokens/s"
        axes.set(title=f"{name} ({about})", xlabel="MiB", ylabel="KL to float32, nats a token", yscale="log")
    figure.savefig(path, dpi=120)
