"""The page and the plot of `instantrt bench cpu`, from what it measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from instantrt.tools.bench.compile_time import shown
from instantrt.tools.bench.cpu_contests import CONTESTS, EIGHT, EIGHT_OURS, FLOAT, Contest
from instantrt.tools.bench.results import Result, quartiles
from instantrt.tools.markdown import table

MIB = 1 << 20
LINEAR = 0.01  # below it the plot's axis of losses is linear, above logarithmic


def ratios(sides: Mapping[str, Result], over: tuple[str, str], under: tuple[str, str]) -> list[float] | None:
    """Quartiles of (configuration, measurement) : (configuration, measurement), round by round."""
    if over[0] not in sides or under[0] not in sides:
        return None
    first, second = (np.array(sides[name]["rounds"][measure]) for name, measure in (over, under))
    return quartiles(first / second)


def markdown(results: Mapping[str, Result]) -> str:
    lines = ["# CPU artifacts beside their peers", "", "Written by `instantrt bench cpu`.", "", ABOUT, ""]
    if any(CONTESTS[result["kind"]].loss for result in results.values()):
        lines += ["![loss against speed](cpu.png)", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", *sides_table(result), "", *wanted_table(result), *notes(result), ""]
    return "\n".join(lines)


def notes(result: Result) -> list[str]:
    """What is known of a result beside its numbers."""
    lines = [result["machine"], *result["versions"]]
    if "text" in result:
        by = result.get("calibration")
        lines.append(f"text: {result['text']}" + (f"; calibrated by {by}" if by else ""))
    lines += [f"not measured: `--{flag}` was not given" for flag in result["not_given"]]
    lines.append(f"a waiting process used at most {result['idle_cpu_s']} s of CPU between two measurements")
    return [f"* {line}" for line in lines]


ABOUT = """Two threads each. Speeds are tokens a second, medians of the rounds; behind them, as ratios within a round
with their quartiles: against llama.cpp's form of as many bits, prefill against OpenVINO int8, encoders against float32.
A decoded token is given, not sampled; 8 rows are one batch, all its tokens counted (a batch of onnxruntime-genai takes
no tokens behind its prompt: it goes on with those that it chooses). The first token: from nothing but
imports to the logits behind a prompt of 8 tokens and one more. Peak memory: of a process after a prompt, mapped files
included. On disk: weights and graph.

The loss of a causal LM is of `examples/text/bench.txt`, or of `--text`, in windows of 512 tokens.

An encoder is as torch exports it, without what sentence-transformers puts behind it, and reads so many texts of so many
tokens at once. Its loss is one minus the cosine to float32's vector, means of its states, averaged over the sentences
of the texts. OpenVINO int8 is NNCF's int8 weights, whose tokens become int8 when it runs; calibrated, NNCF's
post-training quantization.

8 and 4 bits are ours as they come: `--quant a16w8` and `a16w4`; plugin: with kernels of ours, `--plugin auto`.
SmolLM2-135M is what a GGUF file holds, put off its grid and every other (`instantrt bench rescaled`). Of the peers:
llama.cpp quantizes a GGUF file of the checkpoint's bfloat16 weights; onnxruntime-genai's and optimum-intel's exporters
run with their defaults, 4 bits in groups of 32; OpenVINO computes in the precision that it chooses, and gives the last
token's logits, as ours do."""


def sides_table(result: Result) -> list[str]:
    """A row for each configuration."""
    plan, sides = CONTESTS[result["kind"]], result["sides"]
    names = ["", *plan.rounds, "first token", "peak memory", "on disk", *([plan.loss] if plan.loss else [])]
    lines: list[list[str]] = []
    for name, side in sides.items():
        cells = [name, *(speed_cell(plan, sides, name, measure) for measure in plan.rounds)]
        cells += [f"{side['first_s'][1]:.2f} s", f"{side['peak_mb']} MB", f"{side['bytes'] / MIB:.0f} MiB"]
        least = f" (worst cosine {side['least_cosine']})" if "least_cosine" in side else ""
        cells += [f"{side['loss']:.4g}{least}" if least else f"{side['loss']:.4f}"] if plan.loss else []
        lines.append(cells)
    return table(names, lines)


def speed_cell(plan: Contest, sides: Mapping[str, Result], name: str, measure: str) -> str:
    cell = f"{np.median(sides[name]['rounds'][measure]):.4g}"
    bits = sides[name]["bits"]
    base = plan.bases.get((measure, None)) or plan.bases.get((measure, bits))
    ratio = ratios(sides, (name, measure), (base, measure)) if base not in (None, name) else None
    return f"{cell}; {shown(ratio, 'x')}" if ratio else cell


def wanted_table(result: Result) -> list[str]:
    """What is wanted, and what was measured."""
    plan, sides = CONTESTS[result["kind"]], result["sides"]
    lines: list[tuple[str, str, str]] = []
    for goal in plan.goals:
        if ratio := ratios(sides, goal.over, goal.under):
            over, under = (", ".join(each) for each in (goal.over, goal.under))
            lines.append((f"{over} : {under}", f"at least {goal.least:.3g}", shown(ratio, "x")))
    ours = [name for name in (EIGHT, EIGHT_OURS) if name in sides]
    for name, (what, most) in product(ours, plan.limits.items()):
        lines.append((f"{name}: {what}", f"at most {most:g}", f"{LIMITED[what](sides, sides[name]):.4g}"))
    return [*table(("what", "goal", "measured"), lines), ""] if lines else []


LIMITED: Mapping[str, Callable[[Mapping[str, Result], Result], float]] = {
    "loss over float32": lambda sides, one: one["loss"] - sides[FLOAT]["loss"],
    "MiB on disk": lambda _, one: one["bytes"] / MIB,
    "peak memory : bytes on disk": lambda _, one: one["peak_mb"] * MIB / one["bytes"],
    "s to first token": lambda _, one: one["first_s"][1],
}


def ahead(speed: Sequence[float], loss: Sequence[float]) -> list[int]:
    """Those than which none is both faster and better, the slowest first."""
    points = list(zip(speed, loss, strict=True))
    beaten = {(s, bad) for s, bad in points if any(a >= s and b <= bad for a, b in {*points} - {(s, bad)})}
    return sorted((i for i, point in enumerate(points) if point not in beaten), key=lambda i: speed[i])


COLORS = {"ours": "C0", "our encoder": "C0", "llama": "C1", "genai": "C2", "onnx encoder": "C2"}  # OpenVINO's is C3


def plot(results: Mapping[str, Result], path: Path) -> None:
    """Loss above float32's against speed, bytes as a bubble's area; the line joins those that none beats in both."""
    from matplotlib.figure import Figure

    drawn = {name: result for name, result in results.items() if CONTESTS[result["kind"]].loss}
    if not drawn:
        return
    figure = Figure(figsize=(11, 5.5 * len(drawn)), layout="constrained")
    for axes, (name, result) in zip(np.atleast_1d(figure.subplots(len(drawn))), drawn.items(), strict=True):
        plan, sides = CONTESTS[result["kind"]], result["sides"]
        speed = [float(np.median(side["rounds"][plan.speed])) for side in sides.values()]
        most = max(side["bytes"] for side in sides.values())
        loss = [side["loss"] - sides[FLOAT]["loss"] for side in sides.values()]
        areas = [1500 * side["bytes"] / most for side in sides.values()]
        colors = [COLORS.get(plan.forms[each].kind if each in plan.forms else "onnx encoder", "C3") for each in sides]
        labels = [f"{each}, {side['bytes'] / MIB:.0f} MiB" for each, side in sides.items()]
        bubbles(axes, (speed, loss), areas, colors, labels, ahead(speed, loss))
        axes.set(title=name, xlabel=f"tokens a second, {plan.speed}", ylabel=f"{plan.loss}, above float32's")
        axes.set_yscale("symlog", linthresh=LINEAR)
    figure.savefig(path, dpi=120)


def bubbles(
    axes: Any,
    places: tuple[list[float], list[float]],
    areas: list[float],
    colors: list[str],
    labels: list[str],
    line: list[int],
) -> None:
    """Numbered bubbles, with numbers and labels in a legend beside the axes; `line` joins those that it names."""
    axes.plot(*([values[i] for i in line] for values in places), color="lightgray", zorder=0)
    for i, (x, y, area, color, label) in enumerate(zip(*places, areas, colors, labels, strict=True), 1):
        axes.scatter(x, y, area, color, alpha=0.4, label=f"{i}  {label}")
        axes.annotate(str(i), (x, y), ha="center", va="center", fontsize="small")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    keys = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", frameon=False)
    for key in keys.legend_handles:
        key.set_sizes([40])
