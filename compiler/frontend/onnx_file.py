"""An .onnx file -> FLOAT graph whose large constants are references into the file's external data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from compiler.frontend.model import FloatModel, LlmShape
from passes.errors import UserError
from passes.lazy import FOUR_BIT, FileTensor, InMemory, View

MIN_OPSET = 21  # block-wise DequantizeLinear
TARGET_OPSET = 23


def load(path: Path) -> FloatModel:
    """Reads `path`; external data must lie in its folder. An LLM with the interface's names is recognised by them."""
    try:
        model = onnx.load_model(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise UserError("not a readable ONNX file", where=str(path), found=str(error)) from None
    if not model.graph.node:
        raise UserError("not an ONNX model, or an empty one", where=str(path))
    external = {t.name: file_tensor(path, t) for t in model.graph.initializer if t.external_data}
    graph = gs.import_onnx(with_output_ranks(at_least_opset(model, path), path))
    for tensor in graph.tensors().values():
        if not isinstance(tensor, gs.Constant):
            continue
        if tensor.name in external:
            stored = external[tensor.name]
            tensor.values = View(stored, stored.shape, stored.dtype)
        elif math.prod(tensor.shape) > 1 << 10:
            tensor.values = View(InMemory(tensor.values), tuple(tensor.shape), tensor.dtype)
    files = (path, *dict.fromkeys(stored.path for stored in external.values()))
    return FloatModel(graph=graph, folder=path.parent, config={}, tensors={}, llm=llm_shape(graph), files=files)


def with_output_ranks(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model with the type and rank of every output, inferred where it does not say."""
    if not unranked(model):
        return model
    inferred = onnx.shape_inference.infer_shapes(model)
    if names := unranked(inferred):
        raise UserError(
            "the rank of an output is not known",
            where=str(path),
            expected="outputs with a type and a shape, whose sizes may have names",
            found=", ".join(names),
            fix="export the model with the shapes of its outputs",
        )
    return inferred


def unranked(model: onnx.ModelProto) -> list[str]:
    kinds = {output.name: output.type.tensor_type for output in model.graph.output}
    return [name for name, kind in kinds.items() if not kind.elem_type or not kind.HasField("shape")]


def at_least_opset(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model at an opset that has block-wise quantization; an older one is converted."""
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset >= MIN_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, TARGET_OPSET)
    except RuntimeError as error:
        raise UserError(
            f"opset {opset} cannot be brought to {TARGET_OPSET}",
            where=str(path),
            found=str(error).splitlines()[0],
            fix=f"export the model at opset {MIN_OPSET} or later",
        ) from None


def file_tensor(model: Path, tensor: onnx.TensorProto) -> FileTensor:
    """A checked reference to external data: inside the model's folder, inside the file, of the right size."""
    info = {entry.key: entry.value for entry in tensor.external_data}
    folder = model.parent.resolve()
    path = (folder / info.get("location", "")).resolve()
    where = f"{model}, initializer {tensor.name}"
    if not path.is_relative_to(folder):
        raise UserError(
            "external data outside the model's folder",
            where=where,
            found=repr(info.get("location")),
            fix="do not use this model unless you trust where it came from",
        )
    if not path.is_file():
        raise UserError("external data is missing", where=where, expected=str(path))
    dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if dtype in FOUR_BIT:
        raise UserError("four-bit external data", where=where, fix="compile from the float model")
    shape = tuple(tensor.dims)
    size = math.prod(shape) * dtype.itemsize
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", size))
    except ValueError:
        raise UserError("external data with an offset that is no number", where=where, found=str(info)) from None
    available = path.stat().st_size
    if min(shape, default=1) < 0 or length != size or offset < 0 or offset + size > available:
        raise UserError(
            "external data does not fit its tensor",
            where=where,
            expected=f"{size} bytes for {list(shape)} {dtype}",
            found=f"{length} bytes at {offset} of {available}",
        )
    return FileTensor(path, offset, shape, dtype, tensor.name)


def llm_shape(graph: gs.Graph) -> LlmShape | None:
    """The sizes of a causal LM whose inputs and outputs have the interface's names; None for any other graph."""
    inputs, outputs = ({t.name: t for t in side} for side in (graph.inputs, graph.outputs))
    layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in inputs)
    if not layers or "logits" not in outputs:
        return None
    _, kv_heads, _, head_dim = inputs["past_key_values.0.key"].shape
    vocab = outputs["logits"].shape[-1]
    if not all(isinstance(d, int) for d in (kv_heads, head_dim, vocab)):
        return None
    return LlmShape(layers=layers, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab)
