"""The process that runs ONNX files for the smoke run: `python -m instantrt.compiler.smoke.child FOLDER`.

It imports numpy and ONNX Runtime alone. FOLDER/order.json is a list of models:

    {"model": path, "as_written": bool, "steps": [[name, name of the step whose cache it goes on with, or ""], ...],
     "cache": "shared", "concat" or "", "attempts": bool}

FOLDER/feeds.npz holds `step|input`, and for `cache` the prompts and tokens of a batch that the runtime of Triton and
`LLM` then runs. With `attempts` the first step that runs is the only one. Answers go to FOLDER/<index>.npz as
`step|output`; what begins, fails and was done, to standard output, as JSON lines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from instantrt.compiler.serving.runtime.onnx_engine import ENGINES, PAST, Array, open_session

ROWS, CACHED = 2, "cached"  # sequences of different lengths that decode together; the name of that batch's steps
PRESENT = "present."


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def opened(order: Mapping[str, Any]) -> ort.InferenceSession:
    """As a user opens it; a twin as it is written (docs/facts.md, "The twin's session options")."""
    if not order["as_written"]:
        return open_session(order["model"], 0)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(order["model"], options, providers=["CPUExecutionProvider"])


def run(order: Mapping[str, Any], feeds: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    """(step, its outputs), as they come."""
    say(begin="load")
    engine = ENGINES[order["cache"]](order["model"], ROWS, len(feeds[f"{CACHED}|0"]) + 2) if order["cache"] else None
    session = engine.session if engine is not None else opened(order)
    names = [output.name for output in session.get_outputs()]
    caches: dict[str, dict[str, Array]] = {}
    for step, after in order["steps"]:
        say(begin=step)
        given = {key.split("|", 1)[1]: value for key, value in feeds.items() if key.split("|", 1)[0] == step}
        try:
            found = dict(zip(names, session.run(names, given | caches.get(after, {})), strict=True))
        except Exception as error:
            if not order["attempts"]:
                raise
            say(attempt=step, found=str(error))
            continue
        caches[step] = {PAST + n.removeprefix(PRESENT): v for n, v in found.items() if n.startswith(PRESENT)}
        yield step, found
        if order["attempts"]:
            return
    if engine is not None:
        yield from decoded(engine, feeds)
        engine.close()


def decoded(engine: Any, feeds: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    """A prompt into each row of the cache, then tokens for all of them together."""
    prompts, tokens = [feeds[f"{CACHED}|{row}"] for row in range(ROWS)], feeds[f"{CACHED}|tokens"]
    say(begin="prefill")
    yield f"{CACHED} 0", {"logits": np.stack([engine.prefill(row, ids, 0) for row, ids in enumerate(prompts)])}
    done = np.array([len(ids) for ids in prompts])
    for index, ids in enumerate(tokens):
        say(begin=f"decode {index + 1}")
        yield f"{CACHED} {index + 1}", {"logits": np.array(engine.decode(ids, done + index))}


def peak_kb() -> int:
    """This process's peak resident memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def main(folder: Path) -> None:
    orders = json.loads((folder / "order.json").read_text("utf-8"))
    with np.load(folder / "feeds.npz") as file:
        feeds = dict(file)
    for index, order in enumerate(orders):
        say(order=index)
        try:
            answers = {f"{step}|{name}": v for step, found in run(order, feeds) for name, v in found.items()}
        except Exception as error:  # ONNX Runtime's have no common base
            say(failed=str(error))
            continue
        np.savez(folder / f"{index}.npz", **answers)  # type: ignore[arg-type]
        say(done=True, peak_kb=peak_kb())
    say(ended=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
