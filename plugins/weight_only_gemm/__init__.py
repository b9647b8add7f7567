"""WeightOnlyGemm: x [..., K] times 4- or 8-bit codes with exact float zero points, bias and activation, in one kernel.

`op.py` and `semantics.py` say what it computes, `layout.py` in which order codes lie; `config.h` is the table of
kernels and which one serves a size; `*.cu` are the kernels behind the C interface of `kernel.h`, which never see
TensorRT, and `plugin.cpp` is the layer that TensorRT sees.
"""
