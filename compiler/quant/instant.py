"""InstantQuant: a decision for each float linear, from its shape and the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from compiler.quant.config import QuantConfig
from passes.errors import UserError
from passes.insert_qdq import Decisions
from passes.linear import Linear
from passes.quant import Activations, InstantQuant, QuantTensor
from passes.rewrite import Reject
from passes.search import SearchedQuant

Quantizer = InstantQuant | SearchedQuant
QUANTIZERS: dict[str, type[Quantizer]] = {"none": InstantQuant, "mse": SearchedQuant}


def decide(
    linears: Iterable[Linear], config: QuantConfig, scale_dtype: np.dtype[Any], head: str | None, head_format: str
) -> Decisions:
    """Path -> how to quantize it. `head` is the path of the language-model head, which stays float unless `int8`."""
    decisions: dict[str, QuantTensor | Reject] = {}
    for found in linears:
        pattern = config.ignored(found.path)
        if pattern is not None:
            decisions[found.path] = Reject(f"ignored by {pattern!r}")
        elif found.path == head and head_format == "float":
            decisions[found.path] = Reject("the head stays float unless asked: --lm-head int8")
        else:
            decisions[found.path] = instant(found, config, scale_dtype, bits=8 if found.path == head else config.bits)
    return decisions


def instant(found: Linear, config: QuantConfig, scale_dtype: np.dtype[Any], bits: int) -> QuantTensor:
    k = found.shape[1]
    group = k if config.group_size == -1 else config.group_size
    if k % group:
        raise UserError(
            "group_size does not divide the layer's input width",
            where=found.path,
            expected=f"a divisor of {k}",
            found=f"group_size {group}",
            fix=f"another --group-size, or --ignore '{found.path}'",
        )
    symmetric = config.activate_quant
    source = QUANTIZERS[config.search](found.path, found.rows, bits, group, symmetric, scale_dtype)
    activations: Activations = "int8" if config.activate_quant else "float"
    return QuantTensor(found.path, source, found.shape, bits, group, symmetric, scale_dtype, activations)
