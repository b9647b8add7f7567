"""Peak memory of the layer errors on a model of Qwen2-7B's shape with two layers: `instantrt bench accuracy`.

Writes a checkpoint of random weights (3.1 GB) to a temporary folder and measures them in a child process, whose
largest resident set it prints. Memory-mapped pages would count as well; there are none.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from instantrt.tools.bench.layers import peak_kb
from instantrt.tools.bench.synthetic import QWEN2_7B, write_checkpoint


def child(folder: Path) -> None:
    from instantrt.compiler.accuracy.data import load_data
    from instantrt.compiler.accuracy.layer_errors import Graphs, measure_layers
    from instantrt.compiler.plan import plan
    from instantrt.compiler.request import Request

    request = Request(folder, ("x86",), folder / "out", quant="a16w8", group_size=128)
    planned = plan(request)
    exported = peak_kb()
    feeds, ids = next(load_data(planned.model).each(planned.model.llm))
    assert ids is not None
    started = time.monotonic()
    twin, lowered = planned.twins["x86"], planned.lowered["x86"]
    found = measure_layers(Graphs(canonical=twin.canonical, floating=twin.floating, lowered=lowered), feeds)
    peak, before = (kb / 1024**2 for kb in (peak_kb(), exported))
    print(
        f"{len(found.rows)} layers, {ids.size} tokens, {len(found.findings)} findings, "
        f"{time.monotonic() - started:.0f} s, peak RSS {peak:.2f} GiB ({before:.2f} after the export)"
    )


def main() -> None:
    """Writes the model, and measures in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_checkpoint(model, {**QWEN2_7B, "num_hidden_layers": 2})
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(child, model).result()
