"""Canonical Q/DQ -> the explicit operators of ONNX Runtime's CPU provider; never a Q/DQ pair in front of a MatMul comes
out. Imports `core` and `qdq`.

    linear       which form a quantized linear gets, and which comes first
    limbs        per channel: integer products (MatMulIntegerToFloat) on limbs of each token
    groups       int8 tokens against weights in groups: a Scan of exact integer sums
    nbits        com.microsoft.MatMulNBits, weights in blocks along K
    blocks       float activations on MatMulNBits without the rounding that it brings: two limbs by block
    expand       weights in groups against many rows: float, from the time when the model is loaded
    tables       embeddings and other floats in the 16 bits they are stored in; embeddings as int8
    zeros        minima on operators for integer ones: what is missing, added apart
    scales       those of quantized weights in the 16 bits they are rounded to
    attention    grouped attention whose cache may be one buffer
    cached_attention  what that operator wants, its mask apart
    partial_rotary  rotary embeddings of a part of each head
    rotary       rotary embeddings inside of that operator
    packed       queries, keys and values as the one product that they are
"""

from typing import Literal

Preset = Literal["auto", "exact", "fast"]  # how many bits 16-bit activations keep: linear.linear_passes
