"""The logits of every position, from an artifact that delivers the last one's: comparisons and perplexity need all."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnx
import onnxruntime as ort

from instantrt.passes.core.names import IDS, LOGITS
from instantrt.passes.qdq.last_logits import LAST

WEIGHTS = "session.model_external_initializers_file_folder_path"


def every_position(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without the node that picks the last token; as it is where there is none."""
    picked = next((node for node in model.graph.node if node.name == LAST), None)
    if picked is None:
        return model
    after = set(picked.output)
    for node in model.graph.node:  # sorted: a node comes after those that it reads
        if after & set(node.input):
            after |= set(node.output)
            node.input[:] = [picked.input[0] if name == picked.output[0] else name for name in node.input]
    known = [value for value in model.graph.value_info if value.name not in after]
    del model.graph.value_info[:]
    model.graph.value_info.extend(known)
    (logits,) = (output for output in model.graph.output if output.name == LOGITS)
    (ids,) = (value for value in model.graph.input if value.name == IDS)
    logits.type.tensor_type.shape.dim[1].CopyFrom(ids.type.tensor_type.shape.dim[1])
    model.graph.node.remove(picked)
    return model


def open_every_position(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """The artifact at `path` with the logits of every position; its weights are read from where they lie."""
    options.add_session_config_entry(WEIGHTS, str(path.absolute().parent))
    model = every_position(onnx.load_model(path, load_external_data=False))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
