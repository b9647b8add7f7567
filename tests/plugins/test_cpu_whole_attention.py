"""CpuWholeAttention in ONNX Runtime, on the kernels of each kind of CPU: against its definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, RuntimeException

from instantrt.plugins.cpu.whole_attention import OP
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import Array, DType, ShapeError, bits_of
from tests.plugins.kernels_of_cpus import KERNELS
from tests.plugins.one_node import session_of
from tests.plugins.within import assert_within

RANDOM = np.random.default_rng(0)
HEADS = {"12 of 32": (12, 12, 32), "shared": (6, 2, 48), "one of 16": (1, 1, 16), "wide": (2, 1, 80)}
# rows, queries, keys: blocks of queries and tiles of keys that end early, chunks of queries, one of each
SIZES = ((1, 1, 1), (2, 7, 9), (1, 32, 32), (3, 17, 40), (1, 300, 300), (1, 3, 600))
MASKS = {
    "none": None,
    "a row's": lambda rows, heads, queries, keys: (rows, 1, 1, keys),
    "all": lambda rows, heads, queries, keys: (rows, heads, queries, keys),
    "a query's": lambda rows, heads, queries, keys: (1, 1, queries, keys),
}
ATTRS: dict[str, int] = {"query_at": 0, "key_at": 0, "value_at": 0, "scale_bits": 0}


def session(library: Path, truth: bool = False, *, mask: bool = True, **attrs: int) -> ort.InferenceSession:
    names = [p.name for p in OP.inputs][: 4 if mask else 3]
    node = helper.make_node(OP.name, names, ["y"], domain=DOMAIN, **(ATTRS | attrs))
    types = [TensorProto.FLOAT] * 3 + [TensorProto.BOOL if truth else TensorProto.FLOAT]
    inputs = [
        helper.make_tensor_value_info(name, kind, [None] * (4 if name == "mask" else 3))
        for name, kind in zip(names, types, strict=False)
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return session_of(library, helper.make_graph([node], "one", inputs, outputs))


def normal(*shape: int) -> Array:
    """Other numbers at each call, the same ones in each test whatever ran before."""
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.fixture(autouse=True)
def _random(request: pytest.FixtureRequest) -> None:
    RANDOM.bit_generator.state = np.random.default_rng(list(request.node.name.encode())).bit_generator.state


def assert_right(found: Array, given: dict[str, Array], **attrs: int) -> None:
    (expected,) = OP.reference(**given, **(ATTRS | attrs))
    # a weight is as wrong as its score, which is a sum of up to 80 products; values reach 4
    assert_within(found, expected.astype(np.float64), np.abs(expected) + 4, OP.tolerance[DType.F32])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("named", HEADS)
def test_kernels_compute_what_is_defined(
    named: str, kernels: str, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    choose(kernels)
    heads, kv_heads, size = HEADS[named]
    attrs = {"heads": heads, "kv_heads": kv_heads, "size": size}
    for shape in MASKS.values():
        for truth in (False, True) if shape else (False,):
            run = session(cpu_library, truth, mask=shape is not None, **attrs).run
            for rows, queries, keys in SIZES:
                given = {"query": normal(rows, queries, heads * size)}
                given |= {name: normal(rows, keys, kv_heads * size) for name in ("key", "value")}
                if shape is not None:
                    mask = normal(*shape(rows, heads, queries, keys))
                    given["mask"] = mask > -1 if truth else np.where(mask > 1, -np.inf, mask).astype(np.float32)
                assert_right(run(None, given)[0], given, **attrs)


def test_columns_of_one_product(cpu_library: Path) -> None:
    """In any order, between others."""
    attrs = {"heads": 4, "kv_heads": 2, "size": 32, "query_at": 64, "key_at": 0, "value_at": 200}
    attrs["scale_bits"] = bits_of(0.25)
    x = normal(2, 21, 300)
    given = {"query": x, "key": x, "value": x}
    found = session(cpu_library, mask=False, **attrs).run(None, given)[0]
    assert_right(found, given, **attrs)
    apart = {"query": x[..., 64:192], "key": x[..., :64], "value": x[..., 200:264]}
    alone = {"heads": 4, "kv_heads": 2, "size": 32, "scale_bits": bits_of(0.25)}
    (expected,) = session(cpu_library, mask=False, **alone).run(
        None, {name: np.ascontiguousarray(part) for name, part in apart.items()}
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_query_that_sees_nothing_is_zero_and_nan_stays(
    kernels: str, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    choose(kernels)
    given = {name: normal(2, 20, 32) for name in ("query", "key", "value")}
    given["mask"] = np.zeros((2, 1, 20, 20), np.float32)
    given["mask"][1, 0, 3] = -np.inf
    given["mask"][1, 0, 4] = np.finfo(np.float32).min
    given["mask"][1, 0, 5] = -1e30
    given["query"][0, 5, :16] = np.nan
    y = session(cpu_library, heads=2, kv_heads=2, size=16).run(None, given)[0]
    assert not y[1, 3:5].any()
    np.testing.assert_allclose(y[1, 5], given["value"][1].mean(axis=0), atol=1e-6)
    assert np.isnan(y[0, 5, :16]).all()
    y[0, 5, :16] = 0
    assert np.isfinite(y).all()


def test_no_rows_and_no_keys(cpu_library: Path) -> None:
    run = session(cpu_library, mask=False, heads=1, kv_heads=1, size=16).run
    for rows, queries, keys in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        given = {"query": normal(rows, queries, 16), "key": normal(rows, keys, 16), "value": normal(rows, keys, 16)}
        (y,) = run(None, given)
        assert y.shape == (rows, queries, 16)
        assert not y.any()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "queries too narrow": ({"query": normal(2, 5, 63)}, "query has 63 columns, expected 64 from 0 on"),
    "other values": ({"value": normal(2, 6, 64)}, r"value is \[2, 6, 64\], expected \[2, 7, ...\]"),
    "other rows": ({"key": normal(1, 7, 64)}, r"key is \[1, 7, 64\], expected \[2, 7, ...\]"),
    "a mask of other keys": (
        {"mask": np.zeros((2, 1, 5, 1), np.float32)},
        r"mask is \[2, 1, 5, 1\], expected \[2, 4, 5, 7\]",
    ),
    "a mask of other heads": ({"mask": np.zeros((2, 3, 5, 7), np.float32)}, "mask is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str, cpu_library: Path) -> None:
    changed, message = WRONG[case]
    given = {"query": normal(2, 5, 64), "key": normal(2, 7, 64), "value": normal(2, 7, 64)}
    given["mask"] = np.zeros((2, 1, 5, 7), np.float32)
    run = session(cpu_library, heads=4, kv_heads=4, size=16).run
    assert_right(run(None, given)[0], given, heads=4, kv_heads=4, size=16)
    with pytest.raises(InvalidArgument, match=message):
        run(None, given | changed)


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        ({"heads": 9, "kv_heads": 2, "size": 16}, "9 heads cannot share 2"),
        ({"heads": 1, "kv_heads": 1, "size": 24}, "a head has 24 channels, expected a multiple of 16"),
        ({"heads": 1 << 60, "kv_heads": 1, "size": 16}, "heads is 1152921504606846976"),
    ],
)
def test_attributes_that_it_cannot_have(attrs: dict[str, int], message: str, cpu_library: Path) -> None:
    with pytest.raises(RuntimeException, match=message):
        session(cpu_library, **attrs)
    if attrs["heads"] < 10:
        with pytest.raises(ShapeError, match=message):
            OP.bind([(1, 2, 144)] * 3, attrs)
