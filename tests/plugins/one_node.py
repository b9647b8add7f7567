"""ONNX Runtime with the operators for CPUs, for graphs of one of them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnx import GraphProto, helper

from instantrt.plugins.ops import DOMAIN


def session_of(library: Path, graph: GraphProto, opset: int = 21) -> ort.InferenceSession:
    """Two threads, some of whose work is the other's."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(library))
    domains = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
