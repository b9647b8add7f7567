"""Canonical Q/DQ linears -> the explicit integer operators of ONNX Runtime's CPU provider: which form for which.

Never DequantizeLinear + MatMul: recent releases turn that pair into int8-activation kernels silently
(docs/facts.md, "DQ + MatMul on a CPU").
"""

from __future__ import annotations

from typing import Any, Literal

from instantrt.passes.core.rewrite import Lowering
from instantrt.passes.ort import Preset
from instantrt.passes.ort.blocks import LowerToExactBlocks
from instantrt.passes.ort.groups import LowerGroups
from instantrt.passes.ort.limbs import ONE_LIMB, ONE_LIMB_IN_SCAN, TWO_LIMBS, TWO_PRODUCTS, LowerPerChannel
from instantrt.passes.ort.nbits import LowerToMatMulNBits

# By what most calls are (one row, as a language model's steps, or many) and by preset, in order of preference: what one
# leaves, the next takes, and what none takes is refused (docs/facts.md, "Forms by the number of rows").
FORMS: dict[tuple[Literal["steps", "rows"], Preset], tuple[Lowering[Any], ...]] = {
    ("steps", "exact"): (LowerPerChannel(TWO_LIMBS, "float"), LowerGroups(ONE_LIMB_IN_SCAN), LowerToExactBlocks()),
    ("steps", "fast"): (LowerToMatMulNBits(),),
    ("rows", "exact"): (LowerPerChannel(TWO_PRODUCTS, "float"), LowerGroups(ONE_LIMB_IN_SCAN), LowerToExactBlocks()),
    ("rows", "fast"): (LowerPerChannel(ONE_LIMB, "float"), LowerToMatMulNBits()),
}


def linear_passes(preset: Preset, *, steps: bool = True) -> tuple[Lowering[Any], ...]:
    """The lowerings for a preset: exact keeps 14 bits of activations or what the scheme gives them, fast about 8.

    `steps`: most calls have one row for each sequence.
    """
    return (LowerPerChannel(ONE_LIMB, "int8"), *FORMS["steps" if steps else "rows", preset])
