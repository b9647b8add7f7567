"""Operators of ours for CPUs, behind ONNX Runtime.

    CpuGemm       x [..., K] float32 times 4- or 8-bit codes in groups, with bias, activation, gate and residual
    CpuRows       rows of such a matrix: embeddings that share it
    CpuAttention  new tokens over a cache that is one buffer, rotary embeddings and all
    CpuAttentionByToken  the same over a cache of four bits
    CpuWholeAttention  without a cache: every query over every key that a mask leaves
    CpuNorm       rows over the root of the mean of their squares, with or without their mean

`op.py` and the files named after the others say what they compute, `layout.py` in which order codes lie. `gemm.h` and
headers of the same names are the kernels; `avx512.cpp`, `avxvnni.cpp`, `avx2.cpp` and `plain.cpp` what they do on a
kind of CPU, of which `kernels.cpp` takes the best that runs. They stand behind the plain functions of `kernel.h`;
`nodes.h` and the files that include it are the layer that ONNX Runtime sees.
"""
