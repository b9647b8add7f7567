"""What `instantrt inspect MODEL` finds: what a checkpoint is, what is wrong with it, what it would become.

Nothing is compiled and no weight is read but scales, zero points and input orders. The model is instantiated without
storage, which says what config.json announces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instantrt.compiler.checkpoint import read_checkpoint
from instantrt.compiler.decide import own_config
from instantrt.compiler.frontend import hf
from instantrt.compiler.quant.config import QuantConfig
from instantrt.compiler.quant.readers import find_reader
from instantrt.compiler.quant.stored import Reader, StoredLayer, StoredRows, check_no_bias
from instantrt.compiler.support import METHODS, cell, method_of
from instantrt.compiler.target import TARGETS, Backend, Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor
from instantrt.passes.core.quant import QuantTensor

CACHE: Mapping[Backend, np.dtype[Any]] = {  # of TensorRT: float16 or bfloat16
    Backend.ONNXRUNTIME: np.dtype(np.float32),
    Backend.TENSORRT: np.dtype(np.float16),
}


@dataclass(frozen=True)
class LayerReport:
    """One linear layer, `shape` [N, K]. `zeros` and `scales` are their smallest and largest; None for a float one."""

    path: str
    shape: tuple[int, int]
    stored: str
    bits: float
    group_size: int = 0
    zeros: tuple[int, int] | None = None
    scales: tuple[float, float] | None = None
    sorted_inputs: bool = False


@dataclass(frozen=True)
class Problem:
    """Something that would stop a compilation, or that a user should know first."""

    what: str
    where: str = ""
    expected: str = ""
    found: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. `targets` says what each would do with it.

    `bytes_on` is what the weights of an artifact take for each runtime, `cache_bytes_per_token` its keys and values.
    """

    model: str
    format: str
    runs_as: str
    tensors: int
    parameters: int
    bytes: int
    layers: tuple[LayerReport, ...]
    problems: tuple[Problem, ...]
    unannounced: tuple[str, ...]
    notes: tuple[str, ...]
    targets: Mapping[str, str]
    bytes_on: Mapping[str, int]
    cache_bytes_per_token: Mapping[str, int]


def inspect(folder: Path, *, trust_remote_code: bool = False) -> Inspection:
    """Reads the checkpoint's headers and quantization parameters; raises only where nothing can be said at all."""
    if not folder.is_dir():
        raise UserError("instantrt inspect takes a checkpoint's folder", where=str(folder))
    config = hf.read_config(folder, trust_remote_code)
    model = hf.build_skeleton(config, folder, trust_remote_code)
    tensors = hf.renamed(read_checkpoint(folder), model)
    problems: list[Problem] = []
    reader: Reader | None = None
    try:
        reader = find_reader(folder, config, tensors)
    except UserError as error:
        problems.append(problem(error))
    layers = tuple(layer_reports(model, tensors, reader, problems))
    quantized = {layer.path for layer in layers if layer.scales is not None}
    unannounced = announced(model, tensors, quantized, problems)
    llm = hf.llm_shape(model.config)
    numbers = 2 * llm.layers * llm.kv_heads * llm.head_dim
    asked = own_config(reader) if reader is not None else None
    return Inspection(
        model=folder.name,
        format=form(reader, layers),
        runs_as=method_of(asked).name if asked is not None else "float; choose with --quant",
        tensors=len(tensors),
        parameters=sum(p.numel() for p in model.parameters()),
        bytes=sum(size(t) for t in tensors.values()),
        layers=layers,
        problems=tuple(problems),
        unannounced=tuple(unannounced),
        notes=reader.notes if reader is not None else (),
        targets={t.name: outlook(t, asked) for t in TARGETS},
        bytes_on={kind.value: artifact_bytes(model, layers, kind, asked) for kind in Backend},
        cache_bytes_per_token={kind.value: numbers * cache.itemsize for kind, cache in CACHE.items()},
    )


def problem(error: UserError) -> Problem:
    return Problem(error.what, error.where, error.expected, error.found, error.fix)


def layer_reports(
    model: Any, tensors: Mapping[str, FileTensor], reader: Reader | None, problems: list[Problem]
) -> Iterator[LayerReport]:
    """One report for each Linear module; what is inconsistent goes into `problems`."""
    import torch

    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        shape = (module.out_features, module.in_features)
        stored = tensors.get(f"{path}.weight")
        try:
            quant = reader.read(StoredLayer(path, shape, tensors)) if reader is not None else None
            if isinstance(quant, QuantTensor) and isinstance(quant.source, StoredRows):
                scale, zero = quant.source.parameters()
                zeros = int(zero.min()), int(zero.max())
                scales = float(scale.min()), float(scale.max())
                ordered = quant.order is not None
                yield LayerReport(path, shape, described(quant), quant.bits, quant.group_size, zeros, scales, ordered)
                continue
        except UserError as error:
            problems.append(problem(error))
            yield LayerReport(path, shape, "cannot be read", 0)
            continue
        kind = str(stored.dtype) if stored is not None else "tied or missing"
        yield LayerReport(path, shape, kind, 8.0 * stored.dtype.itemsize if stored is not None else 0)


def described(quant: QuantTensor) -> str:
    """How a layer is stored, whatever it is multiplied with."""
    grain = "per channel" if quant.per_channel else f"groups of {quant.group_size}"
    return f"{quant.bits} bits, {grain}, {'symmetric' if quant.symmetric else 'asymmetric'}"


def announced(model: Any, tensors: Mapping[str, FileTensor], quantized: set[str], problems: list[Problem]) -> list[str]:
    """Tensors of the checkpoint that the model has no place for; missing ones and lost biases become problems."""
    groups = hf.parameter_names(model)
    unreadable = {p.where.rpartition(".")[0] for p in problems} | {p.where for p in problems}
    for names in groups:
        path = names[0].removesuffix(".weight")
        if not any(name in tensors for name in names) and path not in quantized | unreadable:
            problems.append(
                Problem("the checkpoint has no such tensor", names[0], fix="check that all shards are there")
            )
    known = {name for names in groups for name in names} | {name for name, _ in model.named_buffers()}
    extra = [n for n in tensors if n not in known and n.rpartition(".")[0] not in quantized]
    for path in quantized:
        bias = tensors.get(f"{path}.bias")
        if bias is not None and bias.name not in known:
            try:
                check_no_bias(bias)
            except UserError as error:
                problems.append(problem(error))
    return extra


def form(reader: Reader | None, layers: tuple[LayerReport, ...]) -> str:
    """The format in a few words."""
    if reader is None:
        return "float"
    grain = "per channel" if reader.group_size == -1 else f"groups of {reader.group_size}"
    order = ", activation order" if any(layer.sorted_inputs for layer in layers) else ""
    return f"{reader.method}, {reader.bits} bits, {grain}{order}"


def outlook(target: Target, asked: QuantConfig | None) -> str:
    """What `instantrt compile --target` would do with the checkpoint."""
    if asked is not None:
        return str(cell(method_of(asked), target))
    methods = [m for m in METHODS if m.quant_method == "instant_quant"]
    return "; ".join(f"{m.name}: {cell(m, target)}" for m in methods)


def artifact_bytes(model: Any, layers: tuple[LayerReport, ...], backend: Backend, asked: QuantConfig | None) -> int:
    """Weights of an artifact, about: codes, scales in float32 on a CPU and 16 bits on a GPU, the rest in 16 bits."""
    scale_bytes = 4 if backend is Backend.ONNXRUNTIME else 2
    widened = backend is Backend.ONNXRUNTIME and asked is not None and asked.activate_quant
    total = 2 * int(sum(p.numel() for p in model.parameters()))
    for layer in layers:
        n, k = layer.shape
        if layer.scales is not None:
            bits = 8 if widened else layer.bits
            total += int(n * k * (bits / 8 - 2)) + n * k // layer.group_size * (scale_bytes + 1)
    return total


def size(tensor: FileTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize
