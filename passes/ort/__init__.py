"""Canonical Q/DQ -> the explicit operators of ONNX Runtime's CPU provider: integer products on limbs, MatMulNBits,
grouped attention, tables and weights in the 16 bits they are stored in. `linear` says which form comes first.
Imports `core` and `qdq`; never a Q/DQ pair in front of a MatMul comes out.
"""

from typing import Literal

Preset = Literal["exact", "fast"]  # how many bits 16-bit activations keep: pipeline.lower_onnxruntime
