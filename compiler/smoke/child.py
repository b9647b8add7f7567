"""The process that runs ONNX files for the smoke run: `python -m instantrt.compiler.smoke.child`.

It imports numpy and ONNX Runtime alone, and reads a line, the name of a folder. FOLDER/order.json is a list of models:

    {"model": path, "form": "artifact", "tapped", "twin", "float" or "original", "attempts": bool,
     "weights": folder of the external data of the form "tapped",
     "steps": [[name, name of the step whose cache it goes on with, or ""], ...], "cache": "shared", "concat" or ""}

FOLDER/feeds.pickle holds `step|input`, and for `cache` the prompts and tokens of a batch that the runtime of Triton and
`LLM` then runs. With `attempts` the first step that runs is the only one. Answers go to FOLDER/<index>.pickle, as soon
as they are there, {step: {output: value}}; the fields of each order's `Ending`, as they become known, to standard
output, as JSON lines.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from instantrt.compiler.serving.runtime.onnx_engine import ENGINES, Array, open_session
from instantrt.compiler.smoke.names import CACHED, LOGITS, past

ROWS = 2  # sequences of different lengths that decode together
FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def opened(order: Mapping[str, Any]) -> ort.InferenceSession:
    """As a user opens it; a reference as it is written (docs/facts.md, "The twin's session options")."""
    if order["form"] in ("artifact", "original"):
        return open_session(Path(order["model"]), spinning=False, libraries=order["libraries"])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for library in order["libraries"]:
        options.register_custom_ops_library(library)
    if order["form"] == "tapped":
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", order["weights"])
        return ort.InferenceSession(Path(order["model"]).read_bytes(), options, providers=["CPUExecutionProvider"])
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return ort.InferenceSession(order["model"], options, providers=["CPUExecutionProvider"])


def run(order: Mapping[str, Any], feeds: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    """(step, its outputs), as they come."""
    say(during="load")
    kind, length = order["cache"], len(feeds.get(f"{CACHED}|0", ())) + 2
    how = {"spinning": False, "libraries": order["libraries"]}
    engine = ENGINES[kind](Path(order["model"]), ROWS, length, **how) if kind else None
    session = engine.session if engine is not None else opened(order)
    types = {i.name: FLOATS.get(i.type) for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    caches: dict[str, dict[str, Array]] = {"": {}}
    refusal: Exception | None = None
    for step, after in order["steps"]:
        say(during=step)
        try:
            found = dict(zip(names, session.run(names, given(feeds, step, types) | caches[after]), strict=True))
        except Exception as error:
            if not order["attempts"]:
                raise
            refusal = error
            continue
        yield step, found
        if order["attempts"]:
            return
        caches[step] = past(found)
    if refusal is not None:
        raise refusal
    if engine is not None:
        yield from decoded(engine, feeds)
        engine.close()


def given(feeds: Mapping[str, Array], step: str, types: Mapping[str, Any]) -> dict[str, Array]:
    """The step's inputs, floats in `types`: an .onnx file may have narrow ones, an artifact a narrow cache."""
    inputs = {key.split("|", 1)[1]: value for key, value in feeds.items() if key.split("|", 1)[0] == step}
    return {n: v.astype(types.get(n) or v.dtype, copy=False) if v.dtype.kind == "f" else v for n, v in inputs.items()}


def decoded(engine: Any, feeds: Mapping[str, Array]) -> Iterator[tuple[str, dict[str, Array]]]:
    """A prompt into each row of the cache, then tokens for all of them together."""
    prompts, tokens = [feeds[f"{CACHED}|{row}"] for row in range(ROWS)], feeds[f"{CACHED}|tokens"]
    say(during="prefill")
    yield f"{CACHED} 0", {LOGITS: np.stack([engine.prefill(row, ids, 0) for row, ids in enumerate(prompts)])}
    done = np.array([len(ids) for ids in prompts])
    for index, ids in enumerate(tokens):
        say(during=f"decode {index + 1}")
        yield f"{CACHED} {index + 1}", {LOGITS: np.array(engine.decode(ids, done + index))}


def peak_kb() -> int:
    """This process's peak resident memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def main(folder: Path) -> None:
    orders = json.loads((folder / "order.json").read_text("utf-8"))
    feeds = pickle.loads((folder / "feeds.pickle").read_bytes())
    for index, order in enumerate(orders):
        say(order=index)
        try:
            answers = dict(run(order, feeds))
        except Exception as error:  # ONNX Runtime's have no common base
            say(failed=str(error))
            continue
        (folder / "coming").write_bytes(pickle.dumps(answers))
        (folder / "coming").rename(folder / f"{index}.pickle")
        say(failed="", peak_kb=peak_kb())


if __name__ == "__main__":
    if told := sys.stdin.readline().rstrip("\n"):  # none where whoever started it has no work, or is gone
        main(Path(told))
