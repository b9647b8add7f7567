"""CpuGemm and CpuRows in ONNX Runtime, on the kernels of each kind of CPU: against their definitions, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from instantrt.plugins.cpu import layout
from instantrt.plugins.cpu.op import (
    CODES,
    GEMM,
    INT8_BLOCKS,
    INT8_ROWS,
    INT16_BLOCKS,
    NONE,
    ROWS,
    TYPES,
    dequantized,
    rounded,
)
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import Array, DType, Op, ShapeError
from tests.plugins.kernels_of_cpus import KERNELS
from tests.plugins.one_node import session_of
from tests.plugins.within import assert_within

FORMS = {"int8": INT8_BLOCKS, "int16": INT16_BLOCKS, "rows": INT8_ROWS}
F32, F16, BF16 = map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16))
SIZES = ((16, 32, 32), (48, 96, 32), (80, 256, 64), (64, 192, 192), (32, 160, 160))  # n, k, group
COUNTS = (1, 2, 3, 7, 8, 13, 40)  # of rows
TOLERANCE = GEMM.tolerance[DType.F32]
ELEMENTS = {"ids": TensorProto.INT64, "codes": TensorProto.UINT8, "affine": TensorProto.UINT8}


@dataclass(frozen=True)
class Weight:
    """Codes and scales as [N, K] and [N, G] have them; zeros are codes, minima, or none."""

    codes: Array
    scales: Array
    zeros: Array | None
    attrs: dict[str, int]

    @property
    def strips(self) -> Array:
        return layout.pack(self.codes, self.attrs["bits"])

    @property
    def affine(self) -> Array:
        parts = [self.scales] if self.zeros is None else [self.scales, self.zeros]
        return np.concatenate([layout.by_strip(part).view(np.uint8) for part in parts], axis=-1)


def weight(n: int, k: int, group: int, bits: int, dtype: np.dtype[Any] = F32, zeros: str = "codes") -> Weight:
    rng = np.random.default_rng([n, k, group, bits])
    scales = rng.uniform(0.001, 0.011, (n, k // group)).astype(dtype)
    points = {
        "codes": rng.integers(0, 2**bits, scales.shape, np.uint8),
        "minima": rng.uniform(-0.5, 0.5, scales.shape).astype(dtype),
        "none": None,
    }[zeros]
    kind = TYPES.index(dtype)
    attrs = {"scale_type": kind, "zero_type": {"codes": CODES, "minima": kind, "none": NONE}[zeros]}
    codes = rng.integers(0, 2**bits, (n, k), np.uint8)
    return Weight(codes, scales, points, {"bits": bits, "group": group, "layout_version": 1, **attrs})


def opened(library: Path, op: Op, inputs: Mapping[str, Array | None], attrs: Mapping[str, Any]) -> ort.InferenceSession:
    """A session of one node; an input without values is given to each run."""
    values = [numpy_helper.from_array(v, name) for name, v in inputs.items() if v is not None]
    names = [port.name if port.name in inputs else "" for port in op.inputs]
    while not names[-1]:
        names.pop()
    node = helper.make_node(op.name, names, ["y"], domain=DOMAIN, **attrs)
    free = [
        helper.make_tensor_value_info(name, ELEMENTS.get(name, TensorProto.FLOAT), None)
        for name, v in inputs.items()
        if v is None
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return session_of(library, helper.make_graph([node], "one", free, [out], values))


@dataclass(frozen=True)
class Linear:
    """A CpuGemm in ONNX Runtime, and what it has to give."""

    weight: Weight
    attrs: dict[str, int]
    bias: Array | None
    residual: bool
    session: ort.InferenceSession

    def run(self, x: Array, residual: Array | None = None) -> Array:
        (y,) = self.session.run(None, {"x": x} | ({} if residual is None else {"residual": residual}))
        return np.asarray(y)

    def check(self, y: Array, x: Array, residual: Array | None = None) -> None:
        shapes = [None if v is None else v.shape for v in (x, *self.constants, residual)]
        assert GEMM.bind(shapes, self.attrs) == (y.shape,)
        (expected,) = GEMM.reference(x, *self.constants, residual, **self.attrs)
        assert_within(y, expected.astype(np.float64), self.magnitude(x, residual), TOLERANCE)

    @property
    def constants(self) -> tuple[Array, Array, Array | None]:
        return self.weight.strips, self.weight.affine, self.bias

    def magnitude(self, x: Array, residual: Array | None) -> Array:
        """Of what is summed: sums of |x| |w|, a gate's times its up and the other way round."""
        values = GEMM.attributes(self.attrs)
        w = dequantized(*self.constants[:2], values)
        x, bias = rounded(x, values["activations"]), 0 if self.bias is None else self.bias
        sums = np.abs(x) @ np.abs(w).T + np.abs(bias)
        if values["gated"]:
            by_strip = (*x.shape[:-1], len(w) // 16, 2, 8)
            (gate, up), (gates, ups) = (np.moveaxis(v.reshape(by_strip), -2, 0) for v in (x @ w.T + bias, sums))
            sums = (gates * np.abs(up) + np.abs(gate) * ups).reshape(*x.shape[:-1], len(w) // 2)
        return np.asarray(sums + (0 if residual is None else np.abs(residual)))


def linear(library: Path, w: Weight, bias: bool = False, residual: bool = False, **attrs: int) -> Linear:
    values = GEMM.attributes(w.attrs | attrs)
    b = np.random.default_rng(5).standard_normal(len(w.codes)).astype(np.float32) if bias else None
    inputs: dict[str, Array | None] = {"x": None, "codes": w.strips, "affine": w.affine}
    inputs |= ({"bias": b} if bias else {}) | ({"residual": None} if residual else {})
    return Linear(w, values, b, residual, opened(library, GEMM, inputs, values))


def normal(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [32, 64, 96, 160])
def test_layout_round_trip(bits: int, k: int) -> None:
    codes = weight(48, k, 32, bits).codes
    packed = layout.pack(codes, bits)
    assert packed.shape == layout.packed_shape(48, k, bits)
    assert np.array_equal(layout.unpack(packed, bits, k), codes)


def test_layout_is_as_documented() -> None:
    w = weight(32, 128, 32, 8)
    row, k = 21, 77  # strip 1, lane 5; 8 bits: block 2, vector 3; 4 bits: block 1, vector 3 of the low nibbles
    assert layout.pack(w.codes, 8)[1, 2, 3 * 64 + 5 * 4 + 1] == w.codes[row, k]
    fours = weight(32, 128, 32, 4).codes
    assert layout.pack(fours, 4)[1, 1, 3 * 64 + 5 * 4 + 1] == fours[row, k] | fours[row, k + 32] << 4
    strips = layout.by_strip(w.scales)
    assert strips[1, 3, 5] == w.scales[row, 3]
    assert np.array_equal(layout.by_row(strips), w.scales)


@pytest.mark.parametrize("k", [96, 256])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zeros", ["codes", "minima", "none"])
def test_reference_is_dequantize_then_matmul(form: str, k: int, zeros: str) -> None:
    """Of x as it is rounded, a block at a time."""
    w, x, n = weight(32, k, 32, 4, F16, zeros), normal(3, k), {"int8": 127, "int16": 32512, "rows": 127}[form]
    scales = np.repeat(w.scales.astype(np.float64), 32, axis=1)
    points = np.repeat((8 + 0 * w.scales if w.zeros is None else w.zeros).astype(np.float64), 32, axis=1)
    dense = w.codes * scales + points if zeros == "minima" else (w.codes - points) * scales
    y = np.zeros((3, 32))
    for i, row in enumerate(x):
        blocks = [row] if form == "rows" else np.split(row, k // 32)
        steps = [np.round(b * (np.float32(n) / np.abs(b).max())) * (np.abs(b).max() / np.float64(n)) for b in blocks]
        y[i] = dense @ np.concatenate(steps)
    (actual,) = GEMM.reference(x, w.strips, w.affine, activations=FORMS[form], **w.attrs)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, y, rtol=1e-6, atol=1e-5)
    exact = x.astype(np.float64) @ dense.T
    assert np.linalg.norm(y - exact) < (6e-5 if form == "int16" else 1.6e-2) * np.linalg.norm(exact)


def test_x_is_rounded_half_to_even() -> None:
    x = np.zeros((1, 64), np.float32)
    x[0, :4], x[0, 32:35] = [127, 0.5, 1.5, -2.5], [-12700, 149, 151]
    assert rounded(x, INT8_BLOCKS)[0, :4].tolist() == [127, 0, 2, -2]
    assert rounded(x, INT8_BLOCKS)[0, 32:35].tolist() == [-12700, 100, 200]
    assert rounded(x, INT8_ROWS)[0, :4].tolist() == [100, 0, 0, 0]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_compute_what_is_defined(
    kernels: str, form: str, bits: int, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    """Each size with each kind of scales and zeros; bias, residual, activation and gate take turns."""
    choose(kernels)
    turns = cycle(product((0, 1, 2, 3), (False, True), (False, True), (0, 1)))
    for (n, k, group), dtype, zeros in product(SIZES, (F32, F16, BF16), ("codes", "minima", "none")):
        activation, bias, residual, gated = next(turns)
        w = weight(n, k, group, bits, dtype, zeros)
        one = linear(cpu_library, w, bias, residual, activations=FORMS[form], activation=activation, gated=gated)
        for m in COUNTS:
            x, r = normal(m, k), normal(m, n // (1 + gated)) if residual else None
            one.check(one.run(x, r), x, r)


def test_x_may_have_any_axes(cpu_library: Path) -> None:
    one = linear(cpu_library, weight(48, 96, 32, 4), residual=True, activation=1)
    for shape in ((), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)):
        x, r = normal(*shape, 96), normal(*shape, 48)
        one.check(one.run(x, r), x, r)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_the_same_bits_in_any_company(
    kernels: str, form: str, bits: int, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    choose(kernels)
    one = linear(cpu_library, weight(80, 288, 32, bits), bias=True, activations=FORMS[form], activation=1)
    x = normal(40, 288)
    whole = one.run(x)
    for m in range(1, 18):
        assert np.array_equal(one.run(x[7 : 7 + m]), whole[7 : 7 + m]), f"{m} rows"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_odd_rows(kernels: str, form: str, cpu_library: Path, choose: Callable[[str], None]) -> None:
    """Zeros, numbers too small to divide by, NaN and infinity: each is its own row's alone."""
    choose(kernels)
    one = linear(cpu_library, weight(48, 96, 32, 4), activations=FORMS[form])
    x = normal(11, 96)
    x[1] = 0
    x[2], x[3], x[4], x[5] = 1e-42, np.float32(2e-38) * x[3], np.float32(1e-35) * x[4], np.float32(1e-30) * x[5]
    x[3:5, ::5] = 0
    x[6, 32:64] = 0  # a block of a row
    x[7, 40], x[8, 70], x[9, 1] = np.nan, np.inf, -np.inf
    y = one.run(x)
    assert np.isnan(y[7:10]).all()
    assert (y[1:5] == 0).all()
    good = [0, 1, 2, 3, 4, 5, 6, 10]
    one.check(y[good], x[good])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_tolerance_bites(form: str, bits: int, cpu_library: Path) -> None:
    """One scale of 256 that is 1 % off, or one code that is off by one."""
    w, x = weight(64, 256, 64, bits), normal(8, 256)
    right = linear(cpu_library, w, activations=FORMS[form])
    right.check(right.run(x), x)
    scales, codes = w.scales.copy(), w.codes.copy()
    scales[37, 2] *= np.float32(1.01)
    codes[11, 130] ^= 1
    for wrong in (Weight(w.codes, scales, w.zeros, w.attrs), Weight(codes, w.scales, w.zeros, w.attrs)):
        y = linear(cpu_library, wrong, activations=FORMS[form]).run(x)
        with pytest.raises(AssertionError, match="off"):
            right.check(y, x)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("zeros", ["codes", "minima", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_have_the_bits_of_their_definition(bits: int, zeros: str, dtype: np.dtype[Any], cpu_library: Path) -> None:
    w = weight(48, 96, 32, bits, dtype, zeros)
    scales = np.repeat(w.scales.astype(np.float32), 32, axis=1)
    points = np.float32(2 ** (bits - 1)) if w.zeros is None else np.repeat(w.zeros.astype(np.float32), 32, axis=1)
    codes = w.codes.astype(np.float32)
    table = codes * scales + points if zeros == "minima" else (codes - points) * scales
    session = opened(cpu_library, ROWS, {"ids": None, "codes": w.strips, "affine": w.affine}, ROWS.attributes(w.attrs))
    for ids in (np.array([[0, 47, 3], [-1, -48, 3]]), np.array(17), np.zeros((2, 0), np.int64), np.arange(-48, 48)):
        (y,) = session.run(None, {"ids": ids})
        assert ROWS.bind((ids.shape, w.strips.shape, w.affine.shape), w.attrs) == (y.shape,)
        assert np.array_equal(y, table[ids])
        (exact,) = ROWS.reference(ids, w.strips, w.affine, **w.attrs)
        magnitude = (codes * np.abs(scales) + np.abs(points))[ids] if zeros == "minima" else np.abs(exact)
        assert_within(y, exact.astype(np.float64), magnitude.astype(np.float64), ROWS.tolerance[DType.F32])


@pytest.mark.parametrize("wrong", [48, -49, 2**40])
def test_a_row_that_is_not_there(wrong: int, cpu_library: Path) -> None:
    w = weight(48, 96, 32, 4)
    session = opened(cpu_library, ROWS, {"ids": None, "codes": w.strips, "affine": w.affine}, ROWS.attributes(w.attrs))
    with pytest.raises(InvalidArgument, match=f"id {wrong} of a table of 48 rows"):
        session.run(None, {"ids": np.array([0, wrong])})


#         what is wrong, what the definition says of it, what the library says when a session is made
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "group 48": ({"group": 48}, "group is 48, expected a multiple of 32", "group is no multiple of 32 that divides K"),
    "group 0": ({"group": 0}, "group is 0, expected a multiple of 32", "a weight without rows or columns"),
    "group": ({"group": 64}, "'codes' axis 1 is 2, expected .* = 3", r"codes is \[2, 2, 512\], expected \[2, 3, 512\]"),
    "bits": ({"bits": 8}, "'codes' axis 1 is 2, expected .* = 3", r"codes is .* expected \[2, 3, 512\]"),
    "other bits": ({"bits": 5}, "bits is 5, expected one of", "bits is 5, which this library does not have"),
    "scales": ({"scale_type": 1}, "'affine' axis 2 is 80", r"affine is .* expected \[2, 3, 48\]"),
    "scale": ({"scale_type": 3}, "scale_type is 3, expected one of", "scale_type is 3, which"),
    "zeros": ({"zero_type": 4}, "'affine' axis 2 is 80", r"affine is .* expected \[2, 3, 64\]"),
    "zero": ({"zero_type": 5}, "zero_type is 5, expected one of", "zero_type is 5, which"),
    "layout": ({"layout_version": 2}, "layout_version is 2, expected one of", "layout_version is 2, which"),
    "form": ({"activations": 3}, "activations is 3, expected one of", "activations is 3, which"),
    "activation": ({"activation": 4}, "activation is 4, expected one of", "activation is 4, which"),
    "gated": ({"gated": 2}, "gated is 2, expected one of", "gated is 2, which"),
    "bias": ({"bias": np.zeros(31, np.float32)}, "'bias' axis 0 is 31", r"bias is \[31\], expected \[32\]"),
    "axes": ({"affine": np.zeros((2, 3), np.uint8)}, "'affine' has 2 axes", "codes and affine have three axes"),
    "strips": ({"affine": np.zeros((1, 3, 80), np.uint8)}, "'affine' axis 0 is 1", r"affine is \[1, 3, 80\]"),
    "block": ({"codes": np.zeros((2, 2, 500), np.uint8)}, "'codes' axis 2 is 500", r"codes is \[2, 2, 500\]"),
    "long groups": (
        {
            **{"group": 65568, "activations": INT8_ROWS, "bits": 4, "zero_type": NONE},
            **{"codes": np.zeros((1, 1025, 512), np.uint8), "affine": np.zeros((1, 1, 64), np.uint8)},
        },
        "group is 65568, expected at most 65536",
        "a group above 65536 with a scale for each row of x",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_refuse(case: str, cpu_library: Path) -> None:
    """The definition and the library know the same of what is wrong."""
    changes, by_definition, by_library = REFUSED[case]
    w = weight(32, 96, 32, 4)
    inputs: dict[str, Any] = {"x": None, "codes": w.strips, "affine": w.affine}
    inputs |= {name: v for name, v in changes.items() if isinstance(v, np.ndarray)}
    attrs = GEMM.attributes(w.attrs) | {name: v for name, v in changes.items() if isinstance(v, int)}
    k = attrs["group"] * inputs["affine"].shape[1]
    shapes = [(1, k) if v is None else v.shape for v in inputs.values()]
    with pytest.raises(ShapeError, match=by_definition):
        GEMM.bind(shapes, attrs)
    with pytest.raises(Exception, match=f"CpuGemm: {by_library}"):  # ONNX Runtime's errors have no common class
        opened(cpu_library, GEMM, inputs, attrs)
    if set(changes) & {"bias", "activations", "activation", "gated"}:
        return
    inputs["ids"] = inputs.pop("x")
    attrs = {attr.name: attrs[attr.name] for attr in ROWS.attrs}
    with pytest.raises(Exception, match=f"CpuRows: {by_library}"):
        opened(cpu_library, ROWS, inputs, attrs)


def test_what_both_take(cpu_library: Path) -> None:
    """The longest group with a scale for each row, and a longer one where x has its own scales."""
    for k, form in ((65536, INT8_ROWS), (65568, INT8_BLOCKS)):
        w = weight(16, k, k, 4)
        one, x = linear(cpu_library, w, activations=form), normal(2, k)
        one.check(one.run(x), x)


@pytest.mark.parametrize("port", ["codes", "affine"])
def test_a_weight_that_is_no_constant_is_refused(port: str, cpu_library: Path) -> None:
    w = weight(32, 96, 32, 4)
    inputs = {"x": None, "codes": w.strips, "affine": w.affine} | {port: None}
    with pytest.raises(Exception, match=f"CpuGemm: input {list(inputs).index(port)} is no constant"):
        opened(cpu_library, GEMM, inputs, GEMM.attributes(w.attrs))


def test_inputs_that_do_not_fit_are_refused_by_each_run(cpu_library: Path) -> None:
    w = weight(32, 96, 32, 4)
    one = linear(cpu_library, w, residual=True)
    x, r = normal(3, 96), normal(3, 32)
    for wrong_x, wrong_r, message in (
        (normal(3, 64), r, r"x is \[3, 64\], expected \[..., 96\]"),
        (normal(), r, r"x is \[\], expected \[..., 96\]"),
        (x, normal(2, 32), r"residual is \[2, 32\], expected \[3, 32\]"),
        (x, normal(1, 3, 32), r"residual is \[1, 3, 32\], expected"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            one.run(wrong_x, wrong_r)
    one.check(one.run(x, r), x, r)
    inputs = {"x": None, "codes": w.strips, "affine": w.affine, "bias": None}
    session = opened(cpu_library, GEMM, inputs, GEMM.attributes(w.attrs))
    with pytest.raises(InvalidArgument, match="bias is no constant"):
        session.run(None, {"x": x, "bias": normal(32)})
