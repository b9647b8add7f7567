"""What WeightOnlyGemm should compute, in float64 where its tensors are: on a GPU, in a fraction of NumPy's time."""

from __future__ import annotations

import numpy as np
import torch

from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import ACTIVATIONS
from instantrt.tools.gpu.gemm import Gemm, Weight


def exact(x: torch.Tensor, w: Weight, options: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 result and sum|x||w|, as plugins/weight_only_gemm/semantics.py defines them."""
    attrs = OP.attributes({a.name: options[a.name] for a in OP.attrs if a.name in options})
    rows, row_scale = x.to(torch.float64), torch.ones((), dtype=torch.float64, device=x.device)
    if attrs["activation_bits"] == 8:
        narrow = x.to(torch.float32)
        amax = narrow.abs().amax(1, keepdim=True)
        # A tensor: torch divides by or into a number with a reciprocal, rounding twice.
        top = torch.full_like(amax, 127)
        amax = torch.where(amax == 0, top, amax)
        rows = (narrow * (top / amax)).round().clamp(-127, 127).to(torch.float64)
        row_scale = (amax / top).to(torch.float64)
    dense = w.dense(torch.float64)
    value, magnitude = rows @ dense.T * row_scale, rows.abs() @ dense.abs().T * row_scale.abs()
    if w.bias is not None:
        value, magnitude = value + w.bias.to(torch.float64), magnitude + w.bias.to(torch.float64).abs()

    def activate(v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(ACTIVATIONS[attrs["activation"]](v.cpu().numpy()))).to(x.device)

    if not attrs["gated"]:
        return activate(value) if attrs["activation"] else value, magnitude
    (gate, up), (gm, um) = (t.view(len(x), -1, 2, 8).unbind(2) for t in (value, magnitude))
    m = gm * up.abs() + um * gate.abs() + gm * um * 2.0**-20
    return (activate(gate) * up).reshape(len(x), -1), m.reshape(len(x), -1)


def check(gemm: Gemm, frobenius: float, element: float) -> torch.Tensor:
    """Run, compare with float64, return the output."""
    gemm()
    y = gemm.output()
    truth, magnitude = exact(gemm.x, gemm.weight, gemm.options)
    off = (y.to(torch.float64) - truth).abs()
    bad = ~(off <= element * truth.abs() + 2.0**-20 * magnitude)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(
            f"{gemm.plan.kernel}: {int(bad.sum())} elements off, first at {at}: {y[at]}, not {truth[at]}"
        )
    relative = float(off.norm() / truth.norm().clamp_min(1e-300))
    if relative > frobenius and float(truth.norm()) > 0:
        raise AssertionError(f"{gemm.plan.kernel}: relative error {relative:.3g}, allowed {frobenius:.3g}")
    return y
