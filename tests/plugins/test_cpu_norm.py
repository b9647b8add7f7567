"""CpuNorm in ONNX Runtime, on the kernels of each kind of CPU: against its definition, and ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from instantrt.plugins.cpu.norm import OP
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import Array, DType, Tolerance, bits_of
from tests.plugins.kernels_of_cpus import KERNELS
from tests.plugins.one_node import session_of
from tests.plugins.within import assert_within

FAR = Tolerance(2e-5, 2.0**-15)  # what float32 leaves of rows whose mean is 100 times as large; squares: 1e-3
SHAPES = ((1, 1, 576), (3, 384), (2, 5, 1), (7,), (2, 17), (40, 63), (300, 130), (0, 32), (2, 0))


def session(library: Path, op: str, names: list[str], **attrs: float) -> ort.InferenceSession:
    attrs = (OP.attributes({}) if op == OP.name else {}) | attrs
    node = helper.make_node(op, names, ["y"], domain=DOMAIN if op == OP.name else "", **attrs)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return session_of(library, helper.make_graph([node], "one", inputs, outputs), 23)


def feeds(shape: tuple[int, ...], names: list[str], mean: float = 0) -> dict[str, Array]:
    shapes = {"x": shape, "scale": shape[-1:], "bias": shape[-1:]}
    rng = np.random.default_rng([*shape, int(mean)])
    found = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in names}
    return found | {"x": found["x"] + np.float32(mean)}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("centered", [0, 1])
def test_kernels_compute_what_is_defined(
    centered: int, kernels: str, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    """Of rows with a mean, too, whose squares are much larger than their distance from it."""
    choose(kernels)
    attrs = {"centered": centered, "epsilon_bits": bits_of(1e-6)}
    for names in (["x", "scale"], ["x", "scale", "bias"]):
        run = session(cpu_library, OP.name, names, **attrs).run
        for shape in SHAPES:
            for mean in (0, 100):
                given = feeds(shape, names, mean)
                (found,), (expected,) = run(None, given), OP.reference(**given, **attrs)
                wide = np.abs(expected.astype(np.float64)) + (1 + abs(mean)) * np.abs(given["scale"]) + 1
                assert_within(found, expected.astype(np.float64), wide, FAR if mean else OP.tolerance[DType.F32])


@pytest.mark.parametrize(("op", "centered"), [("RMSNormalization", 0), ("LayerNormalization", 1)])
def test_it_is_what_onnxruntime_computes(op: str, centered: int, cpu_library: Path) -> None:
    names, given = ["x", "scale"], feeds((4, 96), ["x", "scale"])
    own = session(cpu_library, op, names, epsilon=0.25).run(None, given)[0]
    found = session(cpu_library, OP.name, names, centered=centered, epsilon_bits=bits_of(0.25)).run(None, given)[0]
    np.testing.assert_allclose(found, own, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_row(cpu_library: Path) -> None:
    given = feeds((3, 40), ["x", "scale"])
    given["x"][1, 7], given["x"][2] = np.nan, 0
    y = session(cpu_library, OP.name, ["x", "scale"]).run(None, given)[0]
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()
    assert not y[2].any()


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [((2, 8), "scale", r"scale is \[9\], expected \[8\]"), ((2, 8), "bias", r"bias is \[9\], expected \[8\]")],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], name: str, message: str, cpu_library: Path) -> None:
    names = ["x", "scale", "bias"]
    given = feeds(shape, names) | {name: np.ones(9, np.float32)}
    with pytest.raises(InvalidArgument, match=message):
        session(cpu_library, OP.name, names).run(None, given)


def test_x_without_axes_is_refused(cpu_library: Path) -> None:
    given = {"x": np.array(1, np.float32), "scale": np.ones(1, np.float32)}
    with pytest.raises(InvalidArgument, match="x has no axes"):
        session(cpu_library, OP.name, ["x", "scale"]).run(None, given)
