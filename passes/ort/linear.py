"""Canonical Q/DQ linears -> the explicit integer operators of ONNX Runtime's CPU provider: which form for which.

Never DequantizeLinear + MatMul: recent releases turn that pair into int8-activation kernels silently
(docs/facts.md, "DQ + MatMul on a CPU").
"""

from __future__ import annotations

from typing import Any

from instantrt.passes.core.rewrite import Lowering
from instantrt.passes.ort import Preset
from instantrt.passes.ort.blocks import LowerToExactBlocks
from instantrt.passes.ort.groups import LowerGroups
from instantrt.passes.ort.limbs import TWO_LIMBS, Limbs, LowerPerChannel
from instantrt.passes.ort.nbits import LowerToMatMulNBits


def linear_passes(preset: Preset, one_limb: Limbs) -> tuple[Lowering[Any], ...]:
    """The lowerings in order of preference; what one leaves, the next takes, and what none takes is refused.

    exact   activations keep 14 bits or what the scheme gives them
    fast    whatever is not A8W8 by channel goes to MatMulNBits, whose activations are int8 by block
    auto    the same for what is in groups, whose blocks are small, but for the head, where int8 costs most
            (docs/quantization.md, "Defaults")
    """
    by_channel = LowerPerChannel(TWO_LIMBS, "float")
    forms: dict[Preset, tuple[Lowering[Any], ...]] = {
        "auto": (by_channel, LowerToExactBlocks(heads=True), LowerToMatMulNBits()),
        "exact": (by_channel, LowerGroups(one_limb), LowerToExactBlocks()),
        "fast": (LowerToMatMulNBits(),),
    }
    return LowerPerChannel(one_limb, "int8"), *forms[preset]
