"""The op definition: shapes and errors, the reference against an independent formula, and tolerances that bite."""

import numpy as np
import pytest

from instantrt.plugins import codegen
from instantrt.plugins.schema import DType, ShapeError
from instantrt.plugins.weight_only_gemm import layout
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import ACTIVATIONS, GELU, SILU, exact, quantize_rows
from tests.plugins.cases import BF16, F16, Case
from tests.plugins.within import assert_within

NUMPY = {DType.F16: F16, DType.BF16: BF16}
SHAPES = ((2, 3, 256), (4, 4, 512), (2, 128), (64,))


def test_header_is_what_codegen_writes() -> None:
    assert codegen.HEADER.read_text() == codegen.render(), "run `python -m instantrt.plugins.codegen`"


def test_bind_gives_the_output_shape() -> None:
    assert OP.bind(SHAPES, {}) == ((2, 3, 64),)
    assert OP.bind(SHAPES[:3], {"gated": 1}) == ((2, 3, 32),)
    assert OP.bind(((0, 256), *SHAPES[1:]), {}) == ((0, 64),)
    assert OP.bind(((256,), *SHAPES[1:]), {}) == ((64,),)


@pytest.mark.parametrize(
    ("shapes", "attrs", "message"),
    [
        (((2, 250), (4, 4, 512), (2, 128)), {"group": 250}, "K is 250, expected a positive multiple of 32"),
        (((2, 256), (4, 4, 512), (3, 128)), {}, r"'affine' axis 0 is 3, expected K//group = 2"),
        (((2, 256), (4, 3, 512), (2, 128)), {}, r"'codes' axis 1 is 3"),
        (((2, 256), (4, 4, 512), (2, 144)), {}, "N is 72, expected a positive multiple of 16"),
        (((2, 256), (4, 4, 512), (2, 128), (63,)), {}, "'bias' axis 0 is 63"),
        (((2, 256), (4, 4, 512), (2, 64, 2)), {}, "'affine' has 3 axes"),
        (
            ((2, 256), (4, 4, 512), (2, 128)),
            {"group": 48},
            "group is 48, expected a multiple of 32 that divides K = 256",
        ),
        (((2, 256), (4, 4, 512), (2, 128)), {"layout_version": 2}, "layout_version is 2, expected one of"),
        (((2, 256), (4, 4, 512), (2, 128)), {"activation_bits": 4}, "activation_bits is 4, expected one of"),
        (((2, 65664), (4, 1026, 512), (513, 128)), {"activation_bits": 8}, "K is 65664, expected at most 65536"),
        (((2, 256), (4, 4, 512), (2, 128)), {"grup": 32}, "unknown attributes"),
        (((2, 256), (4, 4, 512)), {}, "expected 4 inputs"),
    ],
)
def test_bind_refuses(shapes: tuple[tuple[int, ...], ...], attrs: dict[str, int], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        OP.bind(shapes, attrs)


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("bits", [4, 8])
def test_reference_is_dequantize_then_matmul(bits: int, dtype: DType) -> None:
    case = Case(m=5, n=48, k=192, bits=bits, group=64, dtype=NUMPY[dtype], bias=True).make()
    scale, zero = (np.repeat(case.affine[:, i::2].astype(np.float64), 64, axis=0) for i in (0, 1))
    w = (layout.unpack(case.codes, bits, 192).T - zero) * scale  # [K, N], as DequantizeLinear has it
    y = case.x.astype(np.float64) @ w + case.bias.astype(np.float64)
    (actual,) = OP.reference(case.x, case.codes, case.affine, case.bias, bits=bits, group=64)
    assert actual.dtype == case.x.dtype
    assert_within(actual, y, np.abs(case.x.astype(np.float64)) @ np.abs(w), OP.tolerance[dtype])


def test_gate_and_up_are_strips_of_eight() -> None:
    case = Case(m=3, n=64, k=64, group=32, activation=SILU).make()
    plain = exact(case.x, case.codes, case.affine, None, OP.attributes({"group": 32}))[0].reshape(3, 4, 2, 8)
    gate, up = plain[:, :, 0].reshape(3, 32), plain[:, :, 1].reshape(3, 32)
    (y,) = OP.reference(case.x, case.codes, case.affine, group=32, activation=SILU, gated=1)
    assert np.allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=2e-3)


@pytest.mark.parametrize(
    ("activation", "at_one", "at_minus_two"), [(SILU, 0.7310586, -0.2384058), (GELU, 0.8413447, -0.0455003)]
)
def test_activation_values(activation: int, at_one: float, at_minus_two: float) -> None:
    assert np.allclose(ACTIVATIONS[activation](np.array([1.0, -2.0, 0.0])), [at_one, at_minus_two, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", list(NUMPY))
@pytest.mark.parametrize("bits", [4, 8])
def test_tolerance_bites(bits: int, dtype: DType) -> None:
    case = Case(m=16, n=128, k=512, bits=bits, group=128, dtype=NUMPY[dtype]).make()
    truth, magnitude = exact(case.x, case.codes, case.affine, None, case.attributes())
    good = OP.reference(case.x, case.codes, case.affine, bits=bits, group=128)[0]
    assert_within(good, truth, magnitude, OP.tolerance[dtype])
    wrong = case.affine.copy()
    wrong[2, 2 * 77] *= np.asarray(1.01 if dtype is DType.F16 else 1.0079, wrong.dtype)  # bf16: 1 % is one step
    bad = OP.reference(case.x, case.codes, wrong, bits=bits, group=128)[0]
    with pytest.raises(AssertionError):
        assert_within(bad, truth, magnitude, OP.tolerance[dtype])


def test_quantize_rows() -> None:
    x = np.array([[0, 0, 0], [1, -2, 0.5], [-127, 63.5, 62.5]], np.float32)
    q, s = quantize_rows(x)
    assert q.tolist() == [[0, 0, 0], [64, -127, 32], [-127, 64, 62]]
    assert np.array_equal(s[:, 0], np.array([1, np.float32(2) / np.float32(127), 1], np.float32))
