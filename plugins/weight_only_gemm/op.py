"""WeightOnlyGemm: y = act(x @ dequant(W)^T + bias); W is exact 4- or 8-bit codes, a float scale and zero per group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from instantrt.plugins.schema import Array, Attr, DType, Op, Port, Tolerance
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.semantics import ACTIVATIONS, NONE, exact


def reference(x: Array, codes: Array, affine: Array, bias: Array | None = None, **attrs: Any) -> tuple[Array, ...]:
    """Codes, scales and zeros are exact; sums and activation are wide; one rounding, to x's type, at the end."""
    return (exact(x, codes, affine, bias, OP.attributes(attrs))[0].astype(x.dtype),)


def check(v: Mapping[str, int]) -> str | None:
    """What no shape term can say. `refuse` in config.cpp says the same; a test holds the two together."""
    n, k, group = v["N"], v["K"], v["group"]
    rules = (
        (k > 0 and k % 32 == 0, f"K is {k}, expected a positive multiple of 32"),
        (n > 0 and n % 16 == 0, f"N is {n}, expected a positive multiple of 16"),
        (n * k < 2**35, f"N * K is {n * k}, expected below 2^35"),
        (
            group > 0 and group % 32 == 0 == k % group,
            f"group is {group}, expected a multiple of 32 that divides K = {k}",
        ),
        (v["activation_bits"] == 16 or k <= 65536, f"K is {k}, expected at most 65536 with activation_bits 8"),
    )
    return next((wrong for holds, wrong in rules if not holds), None)


OP = Op(
    name="WeightOnlyGemm",
    version=1,
    inputs=(
        Port("x", ("...", "K")),
        Port("codes", ("N//16", "-(-K//(256//bits))", "512")),  # frag16, see layout.py
        Port("affine", ("K//group", "2*N")),  # scale, zero, scale, zero, ...: as the checkpoint has them
        Port("bias", ("N",), optional=True),
    ),
    outputs=(Port("y", ("...", "N//(1+gated)")),),
    attrs=(
        Attr("bits", 4, (4, 8)),
        Attr("group", 128),
        Attr("activation", NONE, tuple(ACTIVATIONS)),
        Attr("gated", 0, (0, 1)),
        Attr("activation_bits", 16, (16, 8)),
        Attr("rounded_weights", 0, (0, 1)),  # 1: many rows may use weights rounded to x's type
        Attr("batch_invariant", 0, (0, 1)),  # 1: a row of y has the same bits however many rows x has
        Attr("layout_tag", layout.TAG, (layout.TAG,)),
        Attr("layout_version", layout.VERSION, (layout.VERSION,)),
    ),
    types=tuple((t, DType.I8, t, t, t) for t in (DType.F16, DType.BF16)),
    reference=reference,
    tolerance={DType.F16: Tolerance(4e-4, 2.0**-10), DType.BF16: Tolerance(3e-3, 2.0**-7)},
    check=check,
)
