"""Canonical Q/DQ -> the explicit operators of ONNX Runtime's CPU provider; never a Q/DQ pair in front of a MatMul comes
out. Imports `core` and `qdq`.

    linear       which form a quantized linear gets, and which comes first
    per_channel  per channel: integer products (MatMulIntegerToFloat) on limbs of each token
    limbs        a float token as one or two of integers
    groups       int8 tokens against weights in groups: a Scan of exact integer sums
    nbits        com.microsoft.MatMulNBits, weights in blocks along K
    blocks       float activations on MatMulNBits without the rounding that it brings: two limbs by block
    expand       weights in groups against many rows: float, from the time when the model is loaded
    tables       embeddings in codes
    in_half      what stays float in the 16 bits it is stored in: embeddings, linears, scales of quantized weights
    zeros        minima on operators for integer ones: what is missing, added apart
    attention    grouped attention whose cache may be one buffer
    cached_attention  what that operator wants, its mask apart
    cache_by_token  a cache of four bits: what attention was before it, and what is kept
    whole_attention  attention without a cache; attention_parts finds it
    heads        heads of attention to rows, and back
    sum_into_norm  sums that ONNX Runtime is not to fuse with the norm behind
    partial_rotary  rotary embeddings of a part of each head
    rotary       rotary embeddings inside of that operator
    packed       queries, keys and values as the one product that they are
    cpu_gemm, cpu_rows, cpu_attention, cpu_whole_attention, cpu_norm  the same on kernels of ours
"""

from typing import Literal

Preset = Literal["auto", "exact", "fast"]  # how many bits 16-bit activations keep: linear.linear_passes
