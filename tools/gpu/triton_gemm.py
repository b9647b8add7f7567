"""A plain int4 product in Triton, a peer: weights become fp16 in registers, tensor cores do the rest.

w = (code - zero) * scale in groups of 128 of K, which is also a step of the loop. Byte j of a row's group holds code j
below and code j + 64 above, so that no value has to move between lanes.
"""

from __future__ import annotations

from itertools import product

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

GROUP = 128
LEAST_ROWS = 16  # of x, that tl.dot takes
CONFIGS = [(n, stages) for n, stages in product((32, 64, 128), (3, 5))]  # columns of a block, loads in flight


@triton.jit  # type: ignore[untyped-decorator]
def int4_gemm(x, codes, scales, zeros, y, m, n, k, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    j = tl.arange(0, 64)
    total = tl.zeros((M, N), tl.float32)
    inside = rows[:, None] < m
    for group in tl.range(0, k // 128, num_stages=STAGES):
        at = rows[:, None] * k + group * 128 + j[None, :]
        packed = tl.load(codes + columns[None, :] * (k // 2) + group * 64 + j[:, None])
        scale = tl.load(scales + group * n + columns)[None, :]
        zero = tl.load(zeros + group * n + columns)[None, :]
        low = ((packed & 15).to(tl.float16) - zero) * scale
        high = ((packed >> 4).to(tl.float16) - zero) * scale
        total = tl.dot(tl.load(x + at, mask=inside, other=0.0), low, total)
        total = tl.dot(tl.load(x + at + 64, mask=inside, other=0.0), high, total)
    tl.store(y + rows[:, None] * n + columns[None, :], total.to(tl.float16), mask=inside)


def pack(natural: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] as this kernel reads them: [N, K / 2]."""
    n, k = natural.shape
    low, high = natural.view(n, k // GROUP, 2, GROUP // 2).unbind(2)
    return (low | high << 4).reshape(n, k // 2).contiguous()


def launch(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, y: torch.Tensor,
    config: tuple[int, int],
) -> None:  # fmt: skip
    """`scales` and `zeros` are [K / 128, N]; N must be a multiple of a block's columns."""
    (m, k), n = x.shape, len(codes)
    columns, stages = config
    rows = max(LEAST_ROWS, min(128, triton.next_power_of_2(m)))
    grid = (triton.cdiv(m, rows), n // columns)
    warps = 8 if rows == 128 else 4
    int4_gemm[grid](x, codes, scales, zeros, y, m, n, k, M=rows, N=columns, STAGES=stages, num_warps=warps)
