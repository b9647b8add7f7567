"""The model of what kernels take, held against what an H200 measured; and that no ring is too short for its memory."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest

from instantrt.tools.gpu import predictions
from instantrt.tools.gpu.layers import LAYERS, QUICK
from tests.plugins.kernels import ROOT, Emulated

pytestmark = pytest.mark.slow

FORMATS = {"int4 g128": (4, 128), "int8": (8, 0)}


def test_the_model_agrees_with_an_h200(emulated: dict[int, Emulated]) -> None:
    timings = json.loads((ROOT / "benchmarks" / "gpu" / "h200.json").read_text())["bench"]["timings"]
    ratios = []
    for t in timings:
        if t["kernel"] in FORMATS and t["layer"] in LAYERS:
            bits, group = FORMATS[t["kernel"]]
            found = predictions.estimates(
                emulated[90].library, predictions.GPUS["H200"], t["layer"], t["m"], bits, group
            )
            ratios.append(math.log(found.microseconds / t["median"]))
    assert len(ratios) == 80
    assert math.sqrt(fmean(r * r for r in ratios)) < 0.15
    assert max(map(abs, ratios)) < math.log(1.5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [name for name in predictions.GPUS if name != "B200"])  # which has rings of the small
def test_enough_bytes_are_on_their_way(emulated: dict[int, Emulated], name: str, bits: int) -> None:
    for layer in QUICK:
        for m in (1, 8, 16, 32, 64):
            found = predictions.estimates(emulated[80].library, predictions.GPUS[name], layer, m, bits, 0)
            assert found.limit != predictions.IN_FLIGHT, (layer, m)


def test_the_table_fits_a_terminal(emulated: dict[int, Emulated]) -> None:
    lines = predictions.model_table(emulated[80].library, (1, 16), 4, 128)
    assert len(lines) == 2 + 2 * len(QUICK)
    assert max(map(len, lines[:-1])) <= 104
    invariant = predictions.invariance_table(emulated[80].library, (1, 16), 4, 128)
    assert len(invariant) == 1 + 2
    assert max(map(len, invariant)) <= 104
    assert "1.00-1.00" not in invariant[1].split()[2:], "tiles for many rows, which a single one does not fill"
