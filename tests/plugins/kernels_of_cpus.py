"""The kernels of the library for CPUs."""

KERNELS = ("avx512", "avxvnni", "avx2", "plain")
