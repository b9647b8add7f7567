"""What `tune` measured, as the file that a library reads beside it: plugins/weight_only_gemm/choices.h."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from instantrt.tools.gpu.layers import parse_format, size
from instantrt.tools.gpu.library import LaunchPlan

COLUMNS = "sm multiprocessors bits group activation_bits n k max_m row splits"
# Behind a plan that no problem gets: sums of parts of K that could be a cluster's, or of more blocks than a device has
# multiprocessors
BY_MEMORY = " by memory"
MOST_MULTIPROCESSORS = 256  # kMostMultiprocessors of config.h


def is_taken(plan: LaunchPlan, problem: Mapping[str, int]) -> bool:
    """Whether a library does what a line with this plan says: may_divide of config.cpp, which bounds the workspace."""
    tiles = -(-problem["m"] // plan.tile_m) * -(-problem["n"] // plan.tile_n)
    idle = tiles * plan.splits <= min(problem["sm_count"], MOST_MULTIPROCESSORS)
    return plan.splits == 1 or problem["sm"] == 90 or idle  # whose clusters find room: those that ran


def choices_file(tuned: Iterable[Mapping[str, Any]], gpu: str, commit: str) -> str:
    """A line for each device, layer, format and m of tune's rows: the fastest plan that was right.

    What lies between two measured m is said by the line of the larger one.
    """
    best: dict[tuple[int, ...], Mapping[str, Any]] = {}
    for row in tuned:
        if "wrong" in row or row["plan"].endswith(BY_MEMORY):
            continue
        (n, k), (bits, group, activation_bits) = size(row["layer"]), parse_format(row["format"])
        key = (*row["device"], bits, group or k, activation_bits, n, k, row["m"])
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    lines = [f"# measured on {gpu}, commit {commit}", f"# {COLUMNS}"]
    for key in sorted(best):
        name, _, splits = best[key]["plan"].partition("/")
        lines.append(" ".join(map(str, (*key, name, splits or 1))))
    return "\n".join(lines) + "\n"
