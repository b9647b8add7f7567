"""Skeleton -> graph as torch exports it, its parameters graph inputs named `model.<path>`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from instantrt.compiler.frontend.model import OPSET, LlmShape


@dataclass(frozen=True)
class Exported:
    """A graph as exported, and what a user should know of how."""

    graph: gs.Graph
    notes: tuple[str, ...] = ()


def export_graph(model: Any, shape: LlmShape) -> Exported:
    """Exports with dynamic batch, sequence, past and total; parameters come out as graph inputs."""
    import logging
    import warnings

    import onnx_ir as ir
    import torch
    from onnxscript import optimizer

    from instantrt.compiler.frontend.hf_attention import WithCache

    batch, sequence, past = 2, 3, 5  # any sizes that are not 0 or 1, which the exporter would specialise
    cache = [
        tuple(torch.zeros(batch, shape.kv_heads, past, shape.head_dim) for _ in range(2)) for _ in range(shape.layers)
    ]
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    positions = torch.arange(past, past + sequence).expand(batch, sequence)
    dims = {name: torch.export.Dim(name) for name in ("batch", "sequence", "past", "total")}
    tokens = {0: dims["batch"], 1: dims["sequence"]}
    kv = {0: dims["batch"], 2: dims["past"]}
    dynamic = (tokens, {0: dims["batch"], 1: dims["total"]}, tokens, [(kv, kv)] * shape.layers)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(
            WithCache(model), (ids, mask, positions, cache), dynamic_shapes=dynamic, strict=False
        )
        exported = torch.onnx.export(
            program,
            input_names=shape.input_names(),
            output_names=shape.output_names(),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    traced = exported.model
    parameters = {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in parameters & set(traced.graph.initializers):
        value = traced.graph.initializers.pop(name)
        value.const_value = None  # nothing may fold what was never written
        traced.graph.inputs.append(value)
    optimizer.optimize_ir(traced, input_size_limit=1 << 16, output_size_limit=1 << 20)
    for i, node in enumerate(traced.graph):
        node.name = f"{module_path(node.metadata_props)}/{node.op_type}_{i}"
    graph = gs.import_onnx(ir.to_proto(traced))
    name_dimensions(graph, shape)
    return Exported(graph)


def module_path(metadata: Mapping[str, str]) -> str:
    """The module that the exporter recorded on a node, without the wrapper's own prefix."""
    scopes = re.findall(r"'([^']*)'", metadata.get("pkg.torch.onnx.name_scopes", ""))
    modules = [s.removeprefix("model.") for s in scopes[:-1] if s.startswith("model.")]
    return modules[-1] if modules else ""


def name_dimensions(graph: gs.Graph, shape: LlmShape) -> None:
    """Gives the symbolic dimensions the names of the interface, everywhere they occur."""
    tensors = {t.name: t for t in graph.inputs}
    renamed = {
        str(tensors["input_ids"].shape[0]): "batch",
        str(tensors["input_ids"].shape[1]): "sequence",
        str(tensors["attention_mask"].shape[1]): "total",
        str(tensors["past_key_values.0.key"].shape[2]): "past",
    }
    pattern = re.compile("|".join(rf"\b{re.escape(old)}\b" for old in renamed))
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is not None:
            tensor.shape = [pattern.sub(lambda m: renamed[m[0]], d) if isinstance(d, str) else d for d in tensor.shape]
    for output in graph.outputs:
        if output.name != "logits":
            output.shape = ["batch", shape.kv_heads, "total", shape.head_dim]
