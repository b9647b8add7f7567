"""An orthogonal matrix that spreads what a few channels hold over all."""

from __future__ import annotations

import numpy as np

from instantrt.plugins.schema import Array


def hadamard(size: int) -> Array:
    """float32 [size, size], its own inverse: Sylvester's matrix of the largest power of two that divides `size`, over
    the root of its order, as often along the diagonal as it fits."""
    matrix: Array = np.ones((1, 1))
    while size % (2 * len(matrix)) == 0:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return np.kron(np.eye(size // len(matrix)), matrix / np.sqrt(len(matrix))).astype(np.float32)
