"""A few small launches of every kernel, checked: what compute-sanitizer watches. `python -m tools.gpu.small LIBRARY`"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tools.gpu.gemm import FORMATS, Gemm, check, random_weight
from tools.gpu.library import Library


def main() -> None:
    library = Library(Path(sys.argv[1]))
    kernels = set()
    for bits, activation_bits in FORMATS:
        weight = random_weight(144, 1120, bits, 160, torch.float16, bias=True)
        for m in (3, 12, 20, 70, 130):
            x = torch.randn((m, 1120), device="cuda").half()
            gemm = Gemm(library, x, weight, {"activation_bits": activation_bits, "wide": 1})
            check(gemm, 2e-5, 1e-5)
            kernels.add(gemm.plan.kernel)
    if library.has_cublaslt():
        # the table of an older GPU, whose weights are rounded: the memory is watched, the tests compare the numbers
        older = {"rounded_weights": 1, "library": 1, "sm": 80}
        gemm = Gemm(library, torch.randn((600, 1120), device="cuda").half(), weight, older)
        gemm()
        gemm.output()
        kernels.add(gemm.plan.kernel)
    print("checked", *sorted(kernels))


if __name__ == "__main__":
    main()
