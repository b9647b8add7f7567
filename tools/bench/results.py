"""What every measurement does with its numbers: rounds in which all take turns, quartiles, a file that keeps them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instantrt.passes.core.lazy import Array

Result = dict[str, Any]


def in_turns(work: Mapping[str, Callable[[], object]], rounds: int, warm: int = 0) -> dict[str, Array]:
    """Seconds [rounds] of each, after `warm` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(warm + rounds):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(each[warm:]) for name, each in seconds.items()}


def quartiles(values: Array) -> list[float]:
    return [round(float(v), 2) for v in np.percentile(values, (25, 50, 75))]


def known(path: Path) -> dict[str, Result]:
    """What earlier runs left in the JSON at `path`, by what was measured."""
    results: dict[str, Result] = json.loads(path.read_text())["results"] if path.is_file() else {}
    return results


def keep(path: Path, results: Mapping[str, Result], page: str, **about: Any) -> None:
    """Writes all that is known: the JSON, with what there is to say `about` it, and the page beside it."""
    path.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
