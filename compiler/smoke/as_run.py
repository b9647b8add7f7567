"""The layers of an artifact as ONNX Runtime runs its file, each held against the twin on what the run itself gave it.

A step of int8 more or less, which a last bit decides, may move all that follows, by chance: between two inputs of
quantized layers there is no such chance, because both sides round the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.compiler.accuracy.bisect import Culprit, distance
from instantrt.compiler.accuracy.bounds import Bound
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array
from instantrt.passes.qdq.insert_qdq import quantized

FOLDER = "session.model_external_initializers_file_folder_path"


def culprit_as_run(file: Path, twin: gs.Graph, feeds: Mapping[str, Array], bound: Bound) -> Culprit | None:
    """The first input of a quantized layer, or output, that is not what the twin makes of those before it."""
    readers = [found for node in twin.nodes if (found := quantized(node)) is not None]
    values = run_keeping(file, {found.x.name for found in readers} | {t.name for t in twin.outputs}, feeds)
    for node in twin.nodes:
        for name in (t.name for t in node.outputs if t.name in values):
            before = {key: value for key, value in values.items() if key != name}
            error = distance(values[name], Evaluation(twin, {**feeds, **before}).take(name), worst=False)
            if not error <= bound.layer:
                return Culprit("running the file", node.name, name, error, bound)
    return None


def run_keeping(file: Path, names: set[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The values of `names`, of those that the file has; nothing else stops ONNX Runtime from fusing as it does."""
    model = onnx.load_model(file, load_external_data=False)
    kept = sorted(names & {name for node in model.graph.node for name in node.output})
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kept)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(FOLDER, str(file.parent))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(kept, map(np.asarray, session.run(kept, dict(feeds))), strict=True))
