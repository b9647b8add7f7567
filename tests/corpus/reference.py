"""What an artifact of an odd input must give, computed apart: transformers in float32, or the .onnx file as it came.

A reference takes an artifact's inputs by name, a cache of no token among them, and returns outputs by name.

    a checkpoint             loaded by transformers, with the class that `architectures` names
    a quantized checkpoint   the same of the weights that its layers stand for
    --quant                  every Linear but the head, of the weights that the spec's formula makes of it
    `reference_of(folder)`   what a row wrote there instead, where its point is what of these happens
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import transformers

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.json_file import read_json
from instantrt.compiler.quant.config import FORMATS, SHORT
from instantrt.compiler.quant.readers import announced_reader, unannounced_reader
from instantrt.compiler.quant.stored import Reader, StoredLayer
from instantrt.passes.core.lazy import Array, FileTensor, InMemory, whole
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.ort.tables import SCALE_TYPE
from tests.checkpoints import weight, write_checkpoint
from tests.corpus.row import Row, reference_of

Reference = Callable[[Mapping[str, Array]], dict[str, Array]]
INT8_INPUTS = "int8_inputs"  # key in a reference's config.json: the modules that meet tokens rounded to int8
PARTS = ("qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def reference(row: Row, model: Path) -> Reference:
    """`model` is what `row.make` returned."""
    written = reference_of(model if model.is_dir() else model.parent)
    if model.suffix == ".onnx":
        return of_onnx(written / model.name if written.exists() else model)
    if written.exists():
        return of_transformers(loaded(written))
    reader = announced_reader(model, read_json(model / "config.json")) or unannounced_reader(read_checkpoint(model))
    if reader is not None:
        return of_transformers(loaded(dequantized(model, reader, written, row.fields)))
    found = loaded(model)
    if row.fields.get("quant", "none") != "none":
        instant_quant(found, row.fields)
    return of_transformers(found)


def of_onnx(path: Path) -> Reference:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    types = {i.name: {"tensor(float16)": np.float16}.get(i.type) for i in session.get_inputs()}

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: array.astype(types[name] or array.dtype) for name, array in feeds.items()}
        return dict(zip((o.name for o in session.get_outputs()), session.run(None, given), strict=True))

    return run


def of_transformers(model: Any) -> Reference:
    takes = inspect.signature(model.forward).parameters

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: torch.from_numpy(array) for name, array in feeds.items() if name in takes}
        with torch.no_grad():
            found = model(**given, **({"use_cache": False} if "use_cache" in takes else {}))
        return {name: value.numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}

    return run


def loaded(folder: Path) -> Any:
    """The model that `architectures` names; a causal LM where it names none."""
    names = read_json(folder / "config.json").get("architectures") or ["AutoModelForCausalLM"]
    model = getattr(transformers, names[0]).from_pretrained(folder, dtype=torch.float32).eval()
    for path in getattr(model.config, INT8_INPUTS, ()):
        model.get_submodule(path).register_forward_pre_hook(int8_tokens)
    return model


def int8_tokens(module: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:  # noqa: ARG001
    """A token as the integers that it becomes, times their step: max|x| / 127."""
    (x,) = inputs
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return torch.round(x / step) * step


def instant_quant(model: Any, fields: Mapping[str, Any]) -> None:
    """Replaces weights as `--quant` says. The model itself knows its head, which stays as it is unless asked for."""
    said, group = SHORT[fields["quant"]], fields.get("group_size", -1)
    activate = said["compute_method"] == "activate_quant"
    for path, module in model.named_modules():
        head = module is model.get_output_embeddings()
        kept = head and fields.get("lm_head", "float") == "float"
        if (
            not isinstance(module, torch.nn.Linear)
            or kept
            or any(fnmatchcase(path, p) for p in fields.get("ignore", ()))
        ):
            continue
        w = module.weight.detach().numpy()
        (n, k), bits = w.shape, 8 if head else FORMATS[said["weight_format"]]
        size, dtype = k if group == -1 else group, SCALE_TYPE
        rows = InstantQuant(path, InMemory(w), bits, size, activate, dtype)
        quant = QuantTensor(path, rows, (n, k), bits, size, activate, dtype)
        module.weight = torch.nn.Parameter(torch.from_numpy(weight(quant)))
        if activate:
            module.register_forward_pre_hook(int8_tokens)


def dequantized(folder: Path, reader: Reader, out: Path, fields: Mapping[str, Any]) -> Path:
    """Writes the checkpoint in `folder` as a float one: each quantized layer is what its codes stand for."""
    stored = read_checkpoint(folder)
    tensors, int8 = {}, []
    for name, tensor in stored.items():
        path, _, part = name.rpartition(".")
        if part in ("qweight", "weight_packed") or (part == "weight" and tensor.dtype == np.int8):
            quant = reader.read(StoredLayer(path, shape_of(path, stored, reader), stored))
            assert isinstance(quant, QuantTensor)
            tensors[f"{path}.weight"] = weight(quant)
            int8 += [path] if quant.activations == "int8" and not fields.get("weight_only") else []
        elif part not in PARTS:
            tensors[name] = whole(tensor)
    config = json.loads((folder / "config.json").read_text())
    return write_checkpoint(out, {k: v for k, v in config.items() if "quant" not in k} | {INT8_INPUTS: int8}, tensors)


def shape_of(path: str, tensors: Mapping[str, FileTensor], reader: Reader) -> tuple[int, int]:
    """[N, K] of a quantized layer, as its own tensors have it."""
    if f"{path}.weight_shape" in tensors:
        n, k = whole(tensors[f"{path}.weight_shape"]).tolist()
        return n, k
    if f"{path}.qweight" not in tensors:
        n, k = tensors[f"{path}.weight"].shape
        return n, k
    words, columns = tensors[f"{path}.qweight"].shape
    if reader.method == "awq":
        return columns * 8, words
    return columns, tensors[f"{path}.g_idx"].shape[0] if f"{path}.g_idx" in tensors else words * 32 // reader.bits
