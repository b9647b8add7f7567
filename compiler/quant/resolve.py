"""Request + checkpoint -> the one quantization that will happen, or an error that says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compiler.quant import gptq
from compiler.quant.config import SHORT, QuantConfig, parse_quant_config
from compiler.request import Request
from passes.errors import UserError


def resolve(
    request: Request, folder: Path, config: Mapping[str, Any]
) -> tuple[QuantConfig | None, gptq.GptqConfig | None]:
    """(how to quantize, the checkpoint's own parameters). (None, None) leaves the model float."""
    stored = gptq.find_config(folder, config)
    asked = asked_config(request)
    if stored is None:
        if asked is None and request.enable_quant:
            raise UserError(
                "quantization is enabled, but neither the request nor the checkpoint says how",
                where=str(folder),
                fix="--quant a16w8, or a quant_config",
            )
        if asked is not None and asked.quant_method == "gptq":
            raise UserError(
                "quant_method gptq, but the checkpoint is not quantized", where=str(folder), fix="instant_quant"
            )
        if asked is None and (request.group_size is not None or request.weight_only):
            raise UserError("group_size and weight_only say nothing without quantization", fix="--quant a16w8")
        return asked, None
    return checkpoint_config(request, asked, stored, str(folder))


def asked_config(request: Request) -> QuantConfig | None:
    """What the request alone says, group size and ignore patterns included."""
    if request.quant in (None, "none") and request.quant_config is None:
        return None
    raw = dict(request.quant_config) if request.quant_config is not None else dict(SHORT[str(request.quant)])
    if request.group_size is not None:
        if raw.setdefault("group_size", request.group_size) != request.group_size:
            raise UserError("group_size", expected=str(raw["group_size"]), found=str(request.group_size))
    where = "quant_config" if request.quant_config is not None else f"quant {request.quant}"
    parsed = parse_quant_config(raw, where)
    if request.weight_only and request.quant_config is not None:
        parsed = replace(parsed, compute_method=raw.get("compute_method", "weight_only"))
    if request.weight_only and parsed.activate_quant:
        raise UserError("weight_only and activation quantization exclude each other", where=where)
    return replace(parsed, ignore=(*parsed.ignore, *request.ignore))


def checkpoint_config(
    request: Request, asked: QuantConfig | None, stored: Mapping[str, Any], where: str
) -> tuple[QuantConfig, gptq.GptqConfig]:
    """A quantized checkpoint runs as it is; the request may only choose between A8W8 and A16W8."""
    method = stored.get("quant_method", "gptq")
    if method != "gptq":
        raise UserError(
            "a quantized checkpoint of this method cannot be read", where=where, expected="gptq", found=repr(method)
        )
    params = gptq.parse_config(stored, where)
    weight_format = "int8" if params.bits == 8 else "uint4"
    if request.quant == "none" or request.enable_quant is False:
        raise UserError("the checkpoint holds its weights only quantized", where=where, fix="leave quant out")
    if asked is not None and asked.quant_method != "gptq" and request.quant is None:
        raise UserError(
            "the checkpoint is quantized already; quantizing its weights again would lose accuracy",
            where=where,
            expected="quant_method gptq",
            found=f"quant_method {asked.quant_method}",
        )
    if (
        asked is not None
        and asked.weight_format != weight_format
        and (request.quant or "weight_format" in (request.quant_config or {}))
    ):
        raise UserError(
            "the checkpoint has weights of another width",
            where=where,
            expected=weight_format,
            found=asked.weight_format,
        )
    for group_size in (request.group_size, (request.quant_config or {}).get("group_size")):
        if group_size not in (None, params.group_size):
            raise UserError(
                "the checkpoint has another group_size",
                where=where,
                expected=str(params.group_size),
                found=str(group_size),
            )
    explicit = asked is not None and (request.quant is not None or "compute_method" in (request.quant_config or {}))
    activate = asked.activate_quant if asked is not None and explicit else params.bits == 8 and not request.weight_only
    if activate and params.bits == 4:
        raise UserError("A8W4 is not supported", where=where, fix="leave quant out: 4-bit checkpoints run as A16W4")
    compute = "activate_quant" if activate else "weight_only"
    return QuantConfig("gptq", weight_format, params.group_size, compute, request.ignore), params
