"""strip16: quantized weights in the order in which a CPU's vectors consume them.

W is [N, K] codes, N a multiple of 16, K a multiple of 32. A *strip* is 16 rows of W, columns of y. A *vector* is 64
bytes: of each row in turn four consecutive k, which one instruction (vpdpbusd) multiplies with the same four of x.

    8 bits: a block of 512 bytes is 8 vectors, 16 rows x 32 k
    4 bits: 16 rows x 64 k; vector v has k = 4 v ... 4 v + 3 in its low nibbles and 32 more in its high ones

Blocks: [N / 16][K / block k][512 bytes]. K is padded to a whole block with code 0, which no x meets. Scales and zero
points: [N / 16][groups][16].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from instantrt.plugins.schema import Array

VERSION = 1
STRIP, VECTOR_K, VECTORS = 16, 4, 8
BLOCK_BYTES = STRIP * VECTOR_K * VECTORS


def block_k(bits: int) -> int:
    return 256 // bits


def packed_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    return n // STRIP, -(-k // block_k(bits)), BLOCK_BYTES


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[N, K] codes -> `packed_shape`."""
    n, k = codes.shape
    codes = np.pad(codes, ((0, 0), (0, -k % block_k(bits))))
    w = codes.reshape(n // STRIP, STRIP, -1, 8 // bits, VECTORS, VECTOR_K)  # nibbles are the fourth axis
    w = w[:, :, :, 0] if bits == 8 else np.bitwise_or(w[:, :, :, 0], w[:, :, :, 1] << 4)
    return np.ascontiguousarray(w.transpose(0, 2, 3, 1, 4)).reshape(packed_shape(n, k, bits))


def unpack(packed: NDArray[np.uint8], bits: int, k: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: [N, K] codes."""
    w = packed.reshape(*packed.shape[:2], VECTORS, STRIP, VECTOR_K).transpose(0, 3, 1, 2, 4)
    w = w[:, :, :, None] if bits == 8 else np.stack((w & 15, w >> 4), axis=3)
    return w.reshape(len(packed) * STRIP, -1)[:, :k]


def by_strip(per_group: Array) -> Array:
    """[N, G] -> [N / 16, G, 16]."""
    n, groups = per_group.shape
    return np.ascontiguousarray(per_group.reshape(n // STRIP, STRIP, groups).transpose(0, 2, 1))


def by_row(strips: Array) -> Array:
    """The inverse: [N, G]."""
    return strips.transpose(0, 2, 1).reshape(-1, strips.shape[1])
