"""What `instantrt inspect MODEL` finds: what a checkpoint is, what is wrong with it, what it would become.

Nothing is compiled and no weight is read but scales, zero points and input orders. The model is instantiated without
storage, which says what config.json announces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from instantrt.compiler.decide import asked_config, own_config
from instantrt.compiler.defaults import settle
from instantrt.compiler.frontend import check_model_options, hf
from instantrt.compiler.frontend.account import Account, attempt
from instantrt.compiler.frontend.adapter.folder import model_and_adapter, names_of
from instantrt.compiler.frontend.facts import ModelFacts
from instantrt.compiler.frontend.gguf import gguf_at
from instantrt.compiler.frontend.gguf.folder import made_folder
from instantrt.compiler.frontend.merged import MergedTensor
from instantrt.compiler.frontend.model import EncoderShape, LlmShape
from instantrt.compiler.frontend.side_files import Report
from instantrt.compiler.quant.config import Quant, QuantConfig
from instantrt.compiler.quant.gguf import FLOAT_KINDS, KINDS, GgufTensor
from instantrt.compiler.quant.stored import Reader, StoredRows
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.compiler.support import METHODS, cell, method_of
from instantrt.compiler.target import TARGETS, Backend, Target
from instantrt.passes.core.errors import MissingExtra, UserError, tried
from instantrt.passes.core.lazy import FileTensor
from instantrt.passes.core.linear import Linear
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.qdq.tables import TABLE_BLOCKS

QUANTS: tuple[Quant, ...] = ("a16w8", "a8w8", "a16w4")
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

    `account` is what became of every tensor and file, as in the manifest. `bytes_on` is what the weights of an artifact
    take for each runtime, `bytes_as` likewise by what a float checkpoint is quantized to, with all defaults, and
    `cache_bytes_per_token` its keys and values, 0 where it has no cache. Of a checkpoint that could not be opened, only
    the problems are known.
    """

    model: str
    format: str
    runs_as: str
    problems: tuple[Problem, ...]
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    layers: tuple[LayerReport, ...] = ()
    account: Account = field(default_factory=Account)
    notes: tuple[str, ...] = ()
    targets: Mapping[str, str] = field(default_factory=dict)
    bytes_on: Mapping[str, int] = field(default_factory=dict)
    bytes_as: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cache_bytes_per_token: Mapping[str, int] = field(default_factory=dict)


def inspect(
    folder: Path,
    *,
    trust_remote_code: bool = False,
    truncate_dim: int | None = None,
    cache: Path | None = None,
    requantize: bool = False,
    adapter: Sequence[Path] = (),
    base: Path | None = None,
    say: Say = lambda text: None,
) -> Inspection:
    """Reads the checkpoint's headers and quantization parameters; raises only where nothing can be said at all.

    folder   or a GGUF file, whose codes do not count where it is to be quantized anew (`requantize`); or an adapter
    """
    if gguf_at(folder) is None and not folder.is_dir():
        raise UserError(
            "instantrt inspect takes a checkpoint's folder, or a GGUF file",
            where=str(folder),
            found=f"a {folder.suffix or 'plain'} file" if folder.exists() else "nothing",
        )
    name, found = folder.name, list[UserError]()
    try:
        folder, lora = model_and_adapter(folder, adapter, base)
        named = gguf_at(folder)
        check_model_options(folder, named, truncate_dim=truncate_dim, requantize=requantize)
        with tried("reading the checkpoint", where=str(folder)):
            made = made_folder(named, requantize=requantize, cache=cache) if named is not None else None
            opened = hf.open_checkpoint(
                folder if made is None else made.path,
                weights=None if made is None else made.weights,
                adapter=lora,
                trust_remote_code=trust_remote_code,
                truncate_dim=truncate_dim,
                max_length=1,  # which lengths are asked for is no matter of the checkpoint
                report=found.append,
                cache=cache,
                say=say,
            )
    except MissingExtra:
        raise
    except UserError as error:
        return Inspection(name, "unknown", "nothing: it cannot be opened", problems([*found, error]))
    facts, reader, tensors = opened.taken.facts, opened.reader, opened.taken.tensors
    layers = tuple(layer_reports(opened, found.append))
    shape = facts.shape
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim if isinstance(shape, LlmShape) else 0
    asked = own_config(reader) if reader is not None else None
    return Inspection(
        model=name,
        format=form(reader, layers),
        runs_as=method_of(asked).name if asked is not None else "float; choose with --quant",
        problems=problems(found),
        tensors=opened.taken.count,
        parameters=facts.size,
        bytes=sum(size(t) for t in distinct(tensors)),
        layers=layers,
        account=opened.taken.account,
        notes=(
            *(reader.notes if reader is not None else ()),
            *(names_of(lora, folder) if lora is not None else ()),
            *(() if made is None else (types(made.weights), *made.notes)),
        ),
        targets={t.name: outlook(t, asked) for t in TARGETS},
        bytes_on={kind.value: artifact_bytes(facts, layers, kind, asked, tensors) for kind in Backend},
        bytes_as={quant: quantized_bytes(facts, layers, tensors, folder, quant) for quant in QUANTS if reader is None},
        cache_bytes_per_token={kind.value: numbers * cache.itemsize for kind, cache in CACHE.items()},
    )


def problems(errors: Iterable[UserError]) -> tuple[Problem, ...]:
    return tuple(Problem(e.what, e.where, e.expected, e.found, e.fix) for e in errors)


def layer_reports(opened: hf.OpenCheckpoint, report: Report) -> Iterator[LayerReport]:
    """One report for each linear module; what is wrong with scales and zero points goes to `report`."""
    tensors, layers = opened.taken.tensors, opened.taken.layers
    for path, shape in opened.taken.facts.linears.items():
        stored, quant = tensors.get(f"{path}.weight"), layers.get(path)
        if isinstance(quant, QuantTensor) and isinstance(quant.source, StoredRows):
            parameters = attempt(report, quant.source.parameters)
            if parameters is not None:
                scale, zero = parameters
                zeros = int(zero.min()), int(zero.max())
                scales = float(scale.min()), float(scale.max())
                ordered = quant.order is not None
                yield LayerReport(path, shape, described(quant), quant.bits, quant.group_size, zeros, scales, ordered)
                continue
        if isinstance(quant, QuantTensor) and isinstance(stored, GgufTensor):
            yield LayerReport(path, shape, f"{stored.kind}: {described(quant)}", quant.bits, quant.group_size)
            continue
        if isinstance(quant, QuantTensor) or (opened.reader is not None and quant is None):
            yield LayerReport(path, shape, "cannot be read", 0)
            continue
        kind = str(stored.dtype) if stored is not None else "tied or missing"
        if isinstance(stored, MergedTensor):
            kind = f"{stored.base.dtype} and a LoRA of rank {stored.rank}, in {kind}"
        yield LayerReport(path, shape, kind, 8.0 * stored.dtype.itemsize if stored is not None else 0)


def distinct(tensors: Mapping[str, FileTensor]) -> Iterable[FileTensor]:
    """Each once: a tied head has its table's."""
    return dict.fromkeys(tensors.values())


def types(tensors: Mapping[str, FileTensor]) -> str:
    """How many tensors of a GGUF file are of which type."""
    floats = {dtype: kind for kind, dtype in FLOAT_KINDS.items()}
    kinds = Counter(t.kind if isinstance(t, GgufTensor) else floats[t.dtype] for t in distinct(tensors))
    return "types of tensors: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def described(quant: QuantTensor) -> str:
    """How a layer is stored, whatever it is multiplied with."""
    grain = "per channel" if quant.per_channel else f"groups of {quant.group_size}"
    return f"{quant.bits} bits, {grain}, {quant.zeros}"


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


def artifact_bytes(
    facts: ModelFacts,
    layers: tuple[LayerReport, ...],
    backend: Backend,
    asked: QuantConfig | None,
    tensors: Mapping[str, FileTensor],
) -> int:
    """Weights of an artifact, about: codes, scales and the rest in 16 bits, or in 32 where a CPU has them stored so."""
    if asked is None:
        return sum(float_bytes(facts, names, tensors, backend) for names in facts.groups)
    on_cpu, total = backend is Backend.ONNXRUNTIME, 0
    forms = {f"{layer.path}.weight": layer for layer in layers if layer.group_size}
    for names in facts.groups:
        coded, shape = [forms[name] for name in names if name in forms], facts.parameters[names[0]]
        stored = next((tensors[name] for name in names if name in tensors), None)
        kind = KINDS.get(stored.kind) if isinstance(stored, GgufTensor) and stored.is_quantized else None
        scale = np.dtype(kind.exact).itemsize if on_cpu and kind is not None else 2
        zero = scale if kind is not None and kind.zero is None else 1  # a minimum, or a zero point
        if coded:
            bits = 8 if on_cpu and asked.activate_quant else coded[0].bits
            total += coded_bytes(*coded[0].shape, bits, coded[0].group_size, scale, zero)
        if on_cpu and kind is not None and len(shape) == 2:  # a table stays in codes, which a tied head shares
            total += 0 if coded else coded_bytes(shape[0], shape[1], kind.bits, kind.group_size, scale, zero)
        elif len(coded) < len(names):
            total += 2 * math.prod(shape)
    return total


def quantized_bytes(
    facts: ModelFacts,
    layers: tuple[LayerReport, ...],
    tensors: Mapping[str, FileTensor],
    folder: Path,
    quant: Quant,
) -> dict[str, int]:
    """By runtime, likewise, of a float checkpoint that is compiled with `--quant` alone."""
    heads, of_texts = {path for path in facts.linears if path == facts.head}, isinstance(facts.shape, EncoderShape)
    sized, found = cast(Iterable[Linear], layers), dict[str, int]()  # paths and shapes are all that is asked of them
    for target in (next(t for t in TARGETS if t.backend is backend) for backend in Backend):
        request = Request(folder, (target.name,), folder, quant=quant)
        config = asked_config(request, "instant_quant")
        formats = settle(request, target, config, sized, heads, of_floats=True, of_texts=of_texts)
        forms = {f"{path}.weight": formats.head if path in heads else formats.config for path in facts.linears}
        total = 0
        for names in facts.groups:
            shape, of_group = facts.parameters[names[0]], [form for n in names if (form := forms.get(n)) is not None]
            table = formats.embeddings == "int8" and len(shape) == 2 and shape[0] == facts.shape.vocab
            if of_group:
                n, k = next(facts.linears[n.removesuffix(".weight")] for n in names if n in forms)
                size, bits = of_group[0].group_size, of_group[0].bits
                total += coded_bytes(n, k, bits, k if size == -1 else size)
            elif table:
                total += coded_bytes(shape[0], shape[1], 8, TABLE_BLOCKS[0])
            if not table and len(of_group) < len(names):
                total += float_bytes(facts, names, tensors, target.backend)
        found[target.backend.value] = total
    return found


def float_bytes(facts: ModelFacts, names: list[str], tensors: Mapping[str, FileTensor], backend: Backend) -> int:
    stored = next((tensors[name].dtype.itemsize for name in names if name in tensors), 4)
    return math.prod(facts.parameters[names[0]]) * (min(stored, 4) if backend is Backend.ONNXRUNTIME else 2)


def coded_bytes(n: int, k: int, bits: float, group_size: int, scale: int = 2, zero: int = 1) -> int:
    """Codes, and for each group a scale and a zero point, or a minimum, of so many bytes."""
    return int(n * k * bits / 8) + n * k // group_size * (scale + zero)


def size(tensor: FileTensor) -> int:
    """Bytes in the file."""
    if isinstance(tensor, MergedTensor):
        return sum(map(size, tensor.sources))
    weights, block = tensor.block if isinstance(tensor, GgufTensor) else (1, tensor.dtype.itemsize)
    return math.prod(tensor.shape) // weights * block
