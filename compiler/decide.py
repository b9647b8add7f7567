"""Request + checkpoint -> the one quantization that will happen, and what it makes of each layer.

What does not fit, is impossible or would do nothing is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.defaults import Formats
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.options import FLOAT, QUANTIZED
from instantrt.compiler.quant import instant, stored
from instantrt.compiler.quant.config import SHORT, QuantConfig, expect, parse_quant_config
from instantrt.compiler.quant.stored import Reader
from instantrt.compiler.request import Request, refuse_idle
from instantrt.compiler.target import Backend, Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.ort.nbits import NBITS_BLOCKS
from instantrt.passes.qdq.insert_qdq import Decisions
from instantrt.passes.qdq.last_logits import head_linears
from instantrt.passes.qdq.tables import stored_table

FIXES = {"gguf": "leave it out, or --requantize, which takes a GGUF file's weights as floats"}  # by method


def resolve(request: Request, model: FloatModel) -> QuantConfig | None:
    """How to quantize, or how a quantized checkpoint is; None leaves the model float."""
    folder, reader = request.model, model.reader
    asked = asked_config(request, reader.method if reader is not None else "instant_quant")
    if reader is None:
        if asked is None and request.enable_quant:
            raise UserError(
                "quantization is enabled, but neither the request nor the checkpoint says how",
                where=str(folder),
                fix="--quant a16w8, or a quant_config",
            )
        if asked is not None and asked.quant_method != "instant_quant":
            raise UserError(
                f"quant_method {asked.quant_method}, but the checkpoint is not quantized",
                where=str(folder),
                fix="instant_quant",
            )
        if asked is None:
            refuse_idle(request, QUANTIZED, str(folder), fix="--quant a16w8, or leave it out")
        return asked
    refuse_idle(request, FLOAT, str(folder), fix=FIXES.get(reader.method, "leave it out"))
    return checkpoint_config(request, asked, reader, str(folder))


def asked_config(request: Request, method: str) -> QuantConfig | None:
    """What the request says, group size and ignore patterns included; the short names mean the model's own method."""
    if request.quant in (None, "none") and request.quant_config is None:
        return None
    short = {"quant_method": method, **SHORT.get(str(request.quant), {})}
    raw: dict[str, Any] = dict(short if request.quant_config is None else request.quant_config)
    for key, said in (("group_size", request.group_size), ("search", request.search)):
        if said is not None and raw.setdefault(key, said) != said:
            raise UserError(f"{key} is said twice, and differs", expected=str(raw[key]), found=str(said))
    where = "quant_config" if request.quant_config is not None else f"quant {request.quant}"
    if request.calibration is not None and "search" in raw:
        raise UserError("search and calibration both say how codes are fitted", where=where, fix="give one of them")
    if request.calibration is not None and raw.get("zero_point") == "float":
        what = "zero_point float is the plain formula's, and calibration fits codes to zero points that are codes"
        raise UserError(what, where=where, fix="give one of them")
    parsed = parse_quant_config(raw, where)
    if request.weight_only and parsed.activate_quant:
        raise UserError("weight_only and activation quantization exclude each other", where=where)
    return replace(parsed, ignore=(*parsed.ignore, *request.ignore))


def step_of(targets: Iterable[Target]) -> int:
    """What the size of a group has to be a multiple of."""
    return NBITS_BLOCKS[-1] if any(t.backend is Backend.ONNXRUNTIME for t in targets) else 1


def own_config(reader: Reader, *, weight_only: bool = False) -> QuantConfig:
    """How a quantized checkpoint runs when nothing else is asked for."""
    compute = "activate_quant" if reader.activations == "int8" and not weight_only else "weight_only"
    return QuantConfig(reader.method, "int8" if reader.bits == 8 else "uint4", reader.group_size, compute)


def checkpoint_config(request: Request, asked: QuantConfig | None, reader: Reader, where: str) -> QuantConfig:
    """A quantized checkpoint runs as it is; the request may only choose between float and int8 activations."""
    own = own_config(reader, weight_only=request.weight_only)
    if reader.method == "gguf" and (asked is not None or request.group_size is not None):
        found = f"{'group_size' if asked is None else 'a quantization'} is asked for"
        raise UserError("a GGUF file keeps the types of its layers", where=where, found=found, fix=FIXES["gguf"])
    if request.quant == "none" or request.enable_quant is False:
        raise UserError(
            "the checkpoint holds its weights only quantized",
            where=where,
            fix=FIXES.get(reader.method, "leave quant out"),
        )
    said = request.quant_config or {}
    if asked is not None:
        what = "the checkpoint is quantized already; quantizing its weights again would lose accuracy"
        expect(asked.quant_method == reader.method, asked.quant_method, what, f"quant_method {reader.method}", where)
        if asked.weight_format != own.weight_format and (request.quant or "weight_format" in said):
            given = f"quant {request.quant}" if request.quant else f"weight_format {asked.weight_format}"
            raise UserError(
                "the checkpoint has weights of another width",
                where=where,
                expected=f"{own.bits} bits ({own.weight_format})",
                found=f"{asked.bits} bits ({given})",
                fix="leave it out: the codes are taken as they are; or compile the float model",
            )
    for group_size in (request.group_size, said.get("group_size")):
        right = group_size in (None, reader.group_size)
        expect(right, group_size, "the checkpoint has another group_size", str(reader.group_size), where)
    explicit = asked is not None and (request.quant is not None or "compute_method" in said)
    compute = asked.compute_method if asked is not None and explicit else own.compute_method
    return replace(own, compute_method=compute, ignore=request.ignore if asked is None else asked.ignore)


def check_head(request: Request, config: QuantConfig | None, heads: Iterable[str]) -> None:
    """Refuses a format for a head where there is none to get it."""
    if request.lm_head is None:
        return
    what, where = f"lm_head {request.lm_head} does nothing", str(request.model)
    if not heads:
        found = "none: what a classifier or an embedding model ends in is quantized like the other layers"
        raise UserError(what, where=where, expected="the head of a language model", found=found, fix="leave it out")
    ignored = {path: config.ignored(path) for path in heads} if config is not None else {}
    if request.lm_head == "int8" and all(ignored.values()):
        found = ", ".join(f"{path}, ignored by {pattern!r}" for path, pattern in ignored.items())
        raise UserError(what, where=where, found=found, fix="leave one of them out")


def check_tables(request: Request, graph: gs.Graph) -> None:
    """Refuses int8 for a table that the checkpoint has in codes of another width, which a CPU reads as they are."""
    for node in graph.nodes if request.embeddings == "int8" else ():
        found = stored_table(node, ())
        if found is not None and found.quant.bits != 8:
            raise UserError(
                "embeddings int8: the checkpoint has the table in codes of its own, which are kept",
                where=found.quant.name,
                found=f"{found.quant.bits} bits in groups of {found.quant.group_size}",
                fix="leave it out",
            )


def decide(
    graph: gs.Graph,
    model: FloatModel,
    formats: Formats,
    scale_dtype: np.dtype[Any],
    step: int,
) -> Decisions:
    """How each linear is quantized, or why it is not."""
    found, config = pipeline.linears(graph), formats.config
    if config is None:
        return {}
    if not found:
        raise UserError(
            "the model has no linear layer to quantize",
            expected="MatMul or Gemm by a constant float matrix",
            fix="compile it without --quant",
        )
    for pattern in config.ignore:
        if not any(QuantConfig(ignore=(pattern,)).ignored(each.path) for each in found):
            raise UserError("an ignore pattern matches no layer", found=repr(pattern), expected=found[0].path + ", say")
    if model.reader is not None:
        decisions = stored.decide(found, model.tensors, model.reader, config)
    else:
        decisions = instant.decide(found, config, scale_dtype, formats.heads, formats.head, step)
    if not any(isinstance(d, QuantTensor) for d in decisions.values()):
        reasons = dict.fromkeys(d.reason for d in decisions.values() if isinstance(d, Reject))
        raise UserError("no linear layer is left to quantize", found="; ".join(reasons))
    return decisions


def heads_of(graph: gs.Graph, model: FloatModel) -> frozenset[str]:
    """The linear that makes a language model's logits: the one that the model names, or those that the graph ends in.

    Not the one with as many outputs as there are tokens: an MLP may have as many.
    """
    named = frozenset(found.path for found in pipeline.linears(graph) if found.path == model.head)
    return named or frozenset(found.path for found in (head_linears(graph) if model.llm is not None else []))
