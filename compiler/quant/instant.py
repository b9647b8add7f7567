"""InstantQuant: a decision for each float linear, from its shape and the config alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from instantrt.compiler.quant.config import QuantConfig, or_ignore
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.linear import Linear
from instantrt.passes.core.quant import UINT8, Activations, InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import Reject
from instantrt.passes.qdq.insert_qdq import Decisions

GROUPS = (128, 64, 32)  # those that every target has a form for


def decide(
    linears: Iterable[Linear],
    config: QuantConfig,
    scale_dtype: np.dtype[Any],
    heads: Set[str] = frozenset(),
    head: QuantConfig | None = None,
    step: int = 1,
) -> Decisions:
    """Path -> how to quantize it. `heads` are the paths of language-model heads, which stay float without `head`.

    step   what the target's operators for groups want their size to be a multiple of
    """
    linears = list(linears)
    kept = {found.path: reason for found in linears if (reason := why_float(found.path, config, heads, head))}
    forms = {found.path: head if head is not None and found.path in heads else config for found in linears}
    for form in dict.fromkeys(forms.values()):
        taken = [found for found in linears if found.path not in kept and forms[found.path] == form]
        check_groups({found.path: found.shape[1] for found in taken}, form.group_size, step)
    return {
        found.path: Reject(kept[found.path]) if found.path in kept else instant(found, forms[found.path], scale_dtype)
        for found in linears
    }


def why_float(path: str, config: QuantConfig, heads: Set[str], head: QuantConfig | None) -> str:
    """The reason, or nothing."""
    pattern = config.ignored(path)
    if pattern is not None:
        return f"ignored by {pattern!r}"
    return "the head stays float unless asked: --lm-head int8" if path in heads and head is None else ""


def fits(width: int, group_size: int, step: int = 1) -> bool:
    """Is a row of `width` inputs whole groups of a size that operators have? -1, the row itself, fits every one."""
    return width % group_size == 0 and (group_size % step == 0 or group_size in (width, -1))


def check_groups(widths: Mapping[str, int], group_size: int, step: int = 1, *, instead: str = "") -> None:
    """`widths`: layer -> its inputs. `instead`: what to do, else leave the layers float."""
    bad = [path for path, k in widths.items() if not fits(k, group_size, step)]
    if not bad:
        return
    divides = all(fits(widths[path], group_size) for path in bad)
    divisors = "a divisor of " + " and of ".join(map(str, sorted({widths[path] for path in bad})))
    fitting = [f"{size}, " for size in GROUPS if all(fits(k, size, step) for k in widths.values())]
    raise UserError(
        f"group_size {'is one that no operator has' if divides else 'does not divide the input width of this layer'}",
        where=bad[0] + (f", and {len(bad) - 1} more" if bad[1:] else ""),
        expected=f"a multiple of {step}" if divides else divisors,
        found=f"group_size {group_size}",
        fix=f"--group-size {''.join(fitting)}-1 (per channel){instead or or_ignore(bad)}",
    )


def instant(found: Linear, config: QuantConfig, scale_dtype: np.dtype[Any]) -> QuantTensor:
    group = found.shape[1] if config.group_size == -1 else config.group_size
    symmetric, bits = config.activate_quant, config.bits
    zero_dtype = scale_dtype if config.zero_point == "float" else UINT8
    source = InstantQuant(found.path, found.rows, bits, group, symmetric, scale_dtype, zero_dtype=zero_dtype)
    activations: Activations = "int8" if config.activate_quant else "float"
    return QuantTensor(
        found.path, source, found.shape, bits, group, symmetric, scale_dtype, activations, zero_dtype=zero_dtype
    )
