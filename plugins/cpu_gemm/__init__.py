"""CpuGemm: x [..., K] float32 times 4- or 8-bit codes in groups on a CPU; CpuRows: rows of such a matrix, embeddings.

`op.py` says what they compute, `layout.py` in which order codes lie. `gemm.h` is the kernel, `avx512.cpp`, `avx2.cpp`
and `plain.cpp` are what it does on a kind of CPU, `kernels.cpp` takes the best that runs behind the C interface of
`kernel.h`, and `operators.cpp` is the layer that ONNX Runtime sees.
"""
