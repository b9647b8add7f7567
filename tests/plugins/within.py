"""Is what an operation computed within its tolerance?"""

from __future__ import annotations

import numpy as np

from instantrt.plugins.schema import Array, Tolerance


def assert_within(actual: Array, exact: Array, magnitude: Array, tolerance: Tolerance) -> None:
    """`exact` and `magnitude` (sum of |x||w|) are float64. Cosine similarity would let a wrong scale pass."""
    a = actual.astype(np.float64)
    if a.shape != exact.shape:
        raise AssertionError(f"shape {a.shape}, expected {exact.shape}")
    off = np.abs(a - exact)
    bad = ~(off <= tolerance.element * np.abs(exact) + 2.0**-20 * magnitude)  # a NaN must count as bad
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{int(bad.sum())} of {bad.size} elements off, first at {at}: {a[at]}, expected {exact[at]}"
        )
    relative = float(np.linalg.norm(off) / max(float(np.linalg.norm(exact)), 1e-300))
    if relative > tolerance.frobenius and np.linalg.norm(exact) > 0:
        raise AssertionError(f"relative error {relative:.3g}, allowed {tolerance.frobenius:.3g}")
