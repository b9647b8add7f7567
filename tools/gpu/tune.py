"""Times every row of the table that can serve a layer, to edit the table from: a child of instantrt.tools.gpu.watch.

    python -m instantrt.tools.gpu.tune LIBRARY FORMATS CASE...          formats: "int4 g64,a8w8"
                                                                        cases: "qwen2-7b o m=16", "4096x14336 m=16"

What a row computes is compared with torch's product of the dequantized weights, so that none is fast by being wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from instantrt.tools.gpu import gemm
from instantrt.tools.gpu.bench import label, our_product
from instantrt.tools.gpu.choices import BY_MEMORY, is_taken
from instantrt.tools.gpu.gemm import Gemm, Weight, is_hung, random_weight
from instantrt.tools.gpu.layers import parse_case, parse_format, size
from instantrt.tools.gpu.library import LaunchPlan, Library
from instantrt.tools.gpu.race import copies, race, ready
from instantrt.tools.gpu.watch import emit

SPLITS = (0, 1, 2, 4, 8)
MOST_WAVES = 4  # blocks for each multiprocessor beyond which K is not worth splitting
NO_CLUSTERS, OLDER = {"sm": 100}, "_ampere"  # and rows that both have, by a part of their names
REPLAYS = 9
HOPELESS = 3  # times the best: who is slower need not run again
WRONG = 0.03  # relative error; int8 activations alone make up to 0.01


def candidates(library: Library, problem: dict[str, int]) -> list[LaunchPlan]:
    """Every row and way to split that is worth its time."""
    most = MOST_WAVES * problem["sm_count"]
    plans = library.plans(SPLITS, **problem)
    worth = [p for p in plans if p.splits == 1 or p.splits * p.grid_m * p.grid_n <= most]
    return [p for p in dict.fromkeys([*worth, library.choose(**problem)]) if not is_hung(p, problem["sm"])]


def variants(plan: LaunchPlan, problem: dict[str, int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Labels and options that pin a plan; where its blocks are a cluster, also one that adds up in the workspace."""
    pinned = {"row": plan.row + 1, "splits": plan.splits}
    yield label(plan) + ("" if is_taken(plan, problem) else BY_MEMORY), pinned
    if problem["sm"] == 90 and plan.splits > 1 and OLDER in plan.kernel:
        yield f"{label(plan)}{BY_MEMORY}", {**pinned, **NO_CLUSTERS}


@lru_cache(maxsize=1)
def layer_weights(layer: str, formats: tuple[str, ...]) -> dict[tuple[int, int], list[Weight]]:
    n, k = size(layer)
    keys = {(bits, group or k) for bits, group, _ in map(parse_format, formats)}
    made = {key: random_weight(n, k, *key, torch.float16) for key in sorted(keys)}
    return {key: [w, *(w.copy() for _ in range(copies(w.codes.nbytes) - 1))] for key, w in made.items()}


@lru_cache(maxsize=4)
def dense(layer: str, formats: tuple[str, ...], key: tuple[int, int]) -> torch.Tensor:
    return layer_weights(layer, formats)[key][0].dense(torch.float16)


def case(library: Library, formats: tuple[str, ...], layer: str, m: int) -> list[dict[str, Any]]:
    """For each format and candidate its time and whether it is the table's choice, or what is wrong."""
    found: list[dict[str, Any]] = []
    x = torch.randn((m, size(layer)[1]), device=gemm.DEVICE).half()
    for name in formats:
        bits, group, activation_bits = parse_format(name)
        key = (bits, group or x.shape[1])
        weights, options = layer_weights(layer, formats)[key], {"activation_bits": activation_bits}
        truth = (x @ dense(layer, formats, key).T).float()
        problem = Gemm.problem_of(x, weights[0], options)
        racers = []
        plans = candidates(library, problem)
        for called, pinned in (each for plan in plans for each in variants(plan, problem)):
            asked = {**options, **pinned}
            try:
                if not (wrong := what_is_wrong(Gemm(library, x, weights[0], asked), truth)):
                    racers.append(ready(our_product(library, called, x, weights, **asked)))
            except Exception as error:  # one that cannot be launched; the others go on
                wrong = f"{type(error).__name__}: {error}"
                torch.cuda.synchronize()  # but an error inside a kernel ends this process
            if wrong:
                found.append({"format": name, "layer": layer, "m": m, "plan": called, "wrong": wrong})
        ran = race(layer, m, racers, REPLAYS, HOPELESS)
        chosen = label(library.choose(**problem))
        found += [
            {
                "format": name,
                "layer": layer,
                "m": m,
                "plan": t.kernel,
                "us": t.median,
                "chosen": t.kernel == chosen,
                "device": [problem["sm"], problem["sm_count"]],
            }
            for t in ran
        ]
        torch.cuda.empty_cache()
    return found


def what_is_wrong(one: Gemm, truth: torch.Tensor) -> str:
    """Nothing, or what a launch got wrong."""
    one()
    try:
        off = float((one.output().float() - truth).norm() / truth.norm())
    except AssertionError as stray:
        return str(stray)
    return "" if off <= WRONG else f"relative error {off:.3g}"


def main() -> None:
    path, names, *cases = sys.argv[1:]
    library, formats = Library(Path(path)), tuple(names.split(","))
    for name in cases:
        emit(start=name)
        emit(end=name, outcome="passed", data=case(library, formats, *parse_case(name)))


if __name__ == "__main__":
    main()
