"""InstantQuant: a decision for each float linear, from its shape and the config alone."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import numpy as np

from instantrt.compiler.quant.config import QuantConfig, or_ignore
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.linear import Linear
from instantrt.passes.core.quant import Activations, InstantQuant, Quantizer, QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.core.search import SearchedQuant
from instantrt.passes.qdq.insert_qdq import Decisions

GROUPS = (128, 64, 32)  # those that every target has a form for
QUANTIZERS: dict[str, type[Quantizer]] = {"none": InstantQuant, "mse": SearchedQuant}


def decide(
    linears: Iterable[Linear], config: QuantConfig, scale_dtype: np.dtype[Any], heads: Set[str], head_format: str
) -> Decisions:
    """Path -> how to quantize it. `heads` are the paths of language-model heads, which stay float unless `int8`."""
    linears = list(linears)
    kept = {found.path: reason for found in linears if (reason := why_float(found.path, config, heads, head_format))}
    check_groups([found for found in linears if found.path not in kept], config.group_size)
    return {
        found.path: Reject(kept[found.path])
        if found.path in kept
        else instant(found, config, scale_dtype, bits=8 if found.path in heads else config.bits)
        for found in linears
    }


def why_float(path: str, config: QuantConfig, heads: Set[str], head_format: str) -> str:
    """The reason, or nothing."""
    pattern = config.ignored(path)
    if pattern is not None:
        return f"ignored by {pattern!r}"
    return "the head stays float unless asked: --lm-head int8" if path in heads and head_format == "float" else ""


def check_groups(linears: list[Linear], group_size: int) -> None:
    """-1, a whole row, divides every one."""
    bad = [found for found in linears if found.shape[1] % group_size]
    if not bad:
        return
    fitting = [f"{size}, " for size in GROUPS if not any(found.shape[1] % size for found in linears)]
    raise UserError(
        "group_size does not divide the input width of this layer",
        where=bad[0].path + (f", and {len(bad) - 1} more" if bad[1:] else ""),
        expected=" or ".join(f"a divisor of {k}" for k in sorted({found.shape[1] for found in bad})),
        found=f"group_size {group_size}",
        fix=f"--group-size {''.join(fitting)}-1 (per channel){or_ignore(found.path for found in bad)}",
    )


def instant(found: Linear, config: QuantConfig, scale_dtype: np.dtype[Any], bits: int) -> QuantTensor:
    group = found.shape[1] if config.group_size == -1 else config.group_size
    symmetric = config.activate_quant
    source = QUANTIZERS[config.search](found.path, found.rows, bits, group, symmetric, scale_dtype)
    activations: Activations = "int8" if config.activate_quant else "float"
    return QuantTensor(found.path, source, found.shape, bits, group, symmetric, scale_dtype, activations)
