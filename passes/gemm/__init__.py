"""What linears on kernels of ours have in common: WeightOnlyGemm in engines, CpuGemm on CPUs.

`packed` is their node and its constants, `epilogues` what follows a product and can happen inside it. The lowerings are
in `tensorrt` and `ort`.
"""
