"""Canonical Q/DQ linears -> the explicit integer operators of ONNX Runtime's CPU provider: which form for which.

Never DequantizeLinear + MatMul: recent releases turn that pair into int8-activation kernels silently
(docs/facts.md, "DQ + MatMul on a CPU").
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from instantrt.passes.core.rewrite import Lowering
from instantrt.passes.ort import Preset
from instantrt.passes.ort.blocks import LowerToExactBlocks
from instantrt.passes.ort.expand import ExpandOnLoad
from instantrt.passes.ort.groups import LowerGroups
from instantrt.passes.ort.limbs import ONE_LIMB, ONE_LIMB_UNSIGNED, TWO_LIMBS
from instantrt.passes.ort.nbits import LowerToMatMulNBits
from instantrt.passes.ort.per_channel import LowerPerChannel


def linear_passes(preset: Preset, *, steps: bool = True, signed: bool = True) -> tuple[Lowering[Any], ...]:
    """The lowerings in order of preference; what one leaves, the next takes, and what none takes is refused.

    exact    activations keep 14 bits or what the scheme gives them
    fast     about 8 bits of them, by block; a channel that meets many rows keeps 14, A8W8 is for 8
    auto     the same for what is in groups, whose blocks are small, but for the head, where int8 costs most
             (docs/quantization.md, "Defaults")
    steps    most calls have one row for each sequence, as a language model's; else many
    signed   the CPU multiplies 8 bits by signed 8 bits without saturation
    """
    one = replace(ONE_LIMB if signed else ONE_LIMB_UNSIGNED, many=not steps)
    by_channel, in_groups = LowerPerChannel(replace(TWO_LIMBS, many=not steps), "float"), LowerGroups(one)
    forms: dict[tuple[str, Preset], tuple[Lowering[Any], ...]] = {  # docs/facts.md, "Forms by the number of rows"
        ("steps", "auto"): (by_channel, LowerToExactBlocks(heads=True), LowerToMatMulNBits()),
        ("steps", "exact"): (by_channel, in_groups, LowerToExactBlocks()),
        ("steps", "fast"): (LowerToMatMulNBits(),),
        ("rows", "auto"): (by_channel, in_groups, ExpandOnLoad()),
        ("rows", "exact"): (by_channel, in_groups, ExpandOnLoad()),
        ("rows", "fast"): (by_channel, LowerToMatMulNBits()),
    }
    return (LowerPerChannel(one, "int8"), *forms["steps" if steps else "rows", preset])
