"""CpuAttention in ONNX Runtime, on the kernels of each kind of CPU: against its definition."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument, RuntimeException

from instantrt.plugins.cpu.attention import OP, attended, fresh, read
from instantrt.plugins.cpu.attention_by_token import OP as BY_TOKEN
from instantrt.plugins.cpu.attention_by_token import kept
from instantrt.plugins.cpu.attention_by_token import read as read_by_token
from instantrt.plugins.hadamard import hadamard
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import Array, DType, Op, ShapeError, bits_of
from tests.plugins.kernels_of_cpus import KERNELS
from tests.plugins.one_node import session_of
from tests.plugins.within import assert_within

HEADS = {
    "9 of 3": (9, 3, 64, 64),
    "each its own": (4, 4, 16, 16),
    "partly rotated": (8, 2, 80, 32),
    "one": (6, 1, 48, 48),
}
# rows, new tokens, tokens in the cache: parts of one token's keys, tiles that end early, prompts that are packed
SIZES = ((1, 1, 0), (2, 1, 5), (1, 1, 700), (2, 7, 9), (2, 8, 0), (1, 33, 17), (1, 70, 0))
POSITIONS = 800
CACHES = {row[3].value[0]: (OP, row) for row in OP.types} | {"four bits": (BY_TOKEN, BY_TOKEN.types[0])}
ONNX = {
    DType.F32: TensorProto.FLOAT,
    DType.F16: TensorProto.FLOAT16,
    DType.I8: TensorProto.INT8,
    DType.U8: TensorProto.UINT8,
    DType.I32: TensorProto.INT32,
    DType.I64: TensorProto.INT64,
}
AXES = {"query": 3, "key": 3, "value": 3, "cos": 2, "sin": 2, "positions": 2, "mask": 4, "center": 2}
SCALES = ("key_scale", "value_scale")


def attributes(heads: tuple[int, ...]) -> dict[str, int]:
    """Of queries, keys and values that are one product; of some, neighbours are rotated, and scores have a scale."""
    count, kv_heads, size, _ = heads
    at = {"key_at": count * size, "value_at": (count + kv_heads) * size}
    others = {"interleaved": 1, "scale_bits": bits_of(0.125)} if heads == HEADS["partly rotated"] else {}
    return OP.attributes({"heads": count, "kv_heads": kv_heads} | at | others)


def session(library: Path, of: tuple[int, ...], cache: str = "float32", **attrs: int) -> ort.InferenceSession:
    op, _ = CACHES[cache]
    names = [p.name for p in op.inputs if cache == "int8" or p.name not in SCALES]
    node = helper.make_node(op.name, names, [p.name for p in op.outputs], domain=DOMAIN, **(attributes(of) | attrs))
    return of_node(library, node, cache)


def of_node(library: Path, node: NodeProto, cache: str) -> ort.InferenceSession:
    op, row = CACHES[cache]
    types = [ONNX[kind] for kind in row]
    inputs = [
        helper.make_tensor_value_info(
            name, kind, [None] * AXES.get(name, 4 if "past" in name else 2 if "scale" in name else 1)
        )
        for name, kind in zip(node.input, types, strict=False)
        if name
    ]
    kinds = types[len(op.inputs) :]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(node.output, kinds, strict=True)]
    return session_of(library, helper.make_graph([node], "one", inputs, outputs))


def feeds(heads: tuple[int, ...], rows: int, tokens: int, past: int, cache: str = "float32") -> dict[str, Array]:
    """Every row ends at the last key, and sees all before it."""
    count, kv_heads, size, rotated = heads
    rng = np.random.default_rng([*heads, rows, tokens, past])

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    angles = rng.uniform(0, 2 * np.pi, (POSITIONS, rotated // 2))
    hidden = np.arange(past + tokens) > past + np.arange(tokens)[:, None]
    x = normal(rows, tokens, (count + 2 * kv_heads) * size)
    lines = (rows, kv_heads, past)
    given = {
        "query": x,
        "key": x,
        "value": x,
        "past_key": normal(*lines, size),
        "past_value": normal(*lines, size),
        "last": np.full(rows, past + tokens - 1, np.int32),
        "mask": np.broadcast_to(np.where(hidden, -np.inf, 0).astype(np.float32), (rows, 1, *hidden.shape)).copy(),
        "new": np.full(rows, tokens, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "positions": rng.integers(0, POSITIONS, (rows, tokens)),
    }
    if cache == "float16":
        given |= {name: given[name].astype(np.float16) for name in ("past_key", "past_value")}
    if cache == "int8":  # of which some of the new saturate
        given |= {name: rng.integers(-128, 128, given[name].shape, np.int8) for name in ("past_key", "past_value")}
        given |= {name: rng.uniform(0.005, 0.015, (kv_heads, size)).astype(np.float32) for name in SCALES}
    if cache == "four bits":
        for part, groups in (("key", size // 16), ("value", size // 64 if size % 64 == 0 else 1)):
            names = (f"past_{part}", f"past_{part}_scale", f"past_{part}_zero")
            given |= dict(zip(names, kept(given[f"past_{part}"], groups), strict=True))
        given["center"] = normal(kv_heads, size) / 4
    return given


def padded(given: Mapping[str, Array], *, left: bool) -> dict[str, Array]:
    """The last row with three tokens of padding before it, or with its last two no tokens."""
    found = {name: value.copy() for name, value in given.items()}
    if left:
        found["mask"][-1, ..., :3] = -np.inf
    elif found["new"][-1] > 2:
        found["new"][-1] -= 2
        found["last"][-1] -= 2
        found["mask"][-1, ..., -2:] = -np.inf
    return found


def assert_right(got: list[Array], given: Mapping[str, Array], heads: tuple[int, ...], op: Op = OP) -> None:
    """The cache within a step, and y what follows from the cache that was found."""
    wanted = op.reference(**given, **attributes(heads))
    for port, cache, kept_there in zip(op.outputs[1:], got[1:], wanted[1:], strict=True):
        assert cache.dtype == kept_there.dtype
        found, expected = cache, kept_there
        if op is BY_TOKEN and port.name in ("present_key", "present_value"):
            found, expected = (np.stack([codes & 15, codes >> 4]) for codes in (cache, kept_there))
        step = {4: 1e-5, 2: 2.0**-10, 1: 1}[found.itemsize]
        off = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        assert (off <= step * np.maximum(np.abs(expected.astype(np.float64)), 1)).all()
        assert (off > 0).mean() < 0.02 or found.itemsize == 4
    if op is BY_TOKEN:
        turn = hadamard(heads[2]).astype(np.float64)
        over = [read_by_token(*got[1:4]), read_by_token(*got[4:])]
        y = attended(queries(given, heads) @ turn, *over, given["last"], given["mask"], given["new"])
        parts = y.astype(np.float64).reshape(*y.shape[:2], heads[0], heads[2])
        expected, size = ((part @ by).reshape(y.shape) for part, by in ((parts, turn), (abs(parts), abs(turn))))
    else:
        over = [read(part, given.get(name)) for part, name in zip(got[1:], SCALES, strict=True)]
        expected = attended(queries(given, heads), *over, given["last"], given["mask"], given["new"])
        size = np.abs(expected)
    assert_within(got[0], expected.astype(np.float64), size + 1, OP.tolerance[DType.F32])


def queries(given: Mapping[str, Array], heads: tuple[int, ...]) -> Array:
    """Those of `given`, rotated and scaled, in float64 [B, S, H, D]."""
    parts = (given[name] for name in ("query", "key", "value"))
    angles = (given.get(name) for name in ("cos", "sin", "positions"))
    return fresh(*parts, heads[2], attributes(heads), *angles)[0]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("named", HEADS)
@pytest.mark.parametrize("cache", CACHES)
def test_kernels_compute_what_is_defined(
    cache: str, named: str, kernels: str, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    choose(kernels)
    heads = HEADS[named]
    run = session(cpu_library, heads, cache).run
    for sizes in SIZES:
        given = feeds(heads, *sizes, cache)
        for each in (given, padded(given, left=True), padded(given, left=False)):
            assert_right(run(None, each), each, heads, CACHES[cache][0])


def test_parts_may_be_apart(cpu_library: Path) -> None:
    """What is one product and what are three: the same bits."""
    heads = HEADS["9 of 3"]
    given = feeds(heads, 2, 3, 20)
    whole = session(cpu_library, heads).run(None, given)
    parts = np.split(given["query"], [9 * 64, 12 * 64], axis=-1)
    apart = given | dict(zip(("query", "key", "value"), map(np.ascontiguousarray, parts), strict=True))
    for found, expected in zip(session(cpu_library, heads, key_at=0, value_at=0).run(None, apart), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cache", ["float32", "four bits"])
def test_without_tables_nothing_is_rotated(cache: str, cpu_library: Path) -> None:
    """Without some of them, no kernel is asked."""
    heads, (op, _) = HEADS["9 of 3"], CACHES[cache]
    given = feeds(heads, 2, 3, 20, cache)
    for left_out in (("cos", "sin", "positions"), ("positions",)):
        some = {name: value for name, value in given.items() if name not in left_out}
        names = [p.name if p.name in some else "" for p in op.inputs]
        node = helper.make_node(op.name, names, [p.name for p in op.outputs], domain=DOMAIN, **attributes(heads))
        opened = of_node(cpu_library, node, cache)
        if "cos" in some:
            with pytest.raises(InvalidArgument, match="cos, sin and positions go together"):
                opened.run(None, some)
        else:
            assert_right(opened.run(None, some), some, heads, op)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_token_sees_none_behind_itself(sizes: tuple[int, int, int], cpu_library: Path) -> None:
    """Whatever the mask says: this one hides nothing."""
    heads = HEADS["9 of 3"]
    given = padded(feeds(heads, *sizes), left=False)
    given["mask"][:] = 0
    assert_right(session(cpu_library, heads).run(None, given), given, heads)


@pytest.mark.parametrize("past", [40, 600])
def test_padding_alone_is_zero(past: int, cpu_library: Path) -> None:
    heads = HEADS["9 of 3"]
    given = feeds(heads, 2, 1, past) | {"new": np.int32([0, 1]), "last": np.int32([past - 1, past])}
    found = session(cpu_library, heads).run(None, given)
    assert_right(found, given, heads)
    assert not found[0][0].any()


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_may_be_one_buffer(cache: str, cpu_library: Path) -> None:
    """Past and present are the same memory, longer than what is in it: the new tokens alone are written."""
    heads, room = HEADS["9 of 3"], 64
    given = feeds(heads, 2, 3, 20, cache)
    opened = session(cpu_library, heads, cache)
    apart = opened.run(None, given)
    binding = opened.io_binding()
    buffers = {}
    for name, value in given.items():
        if name.startswith("past"):
            buffers[name] = np.full((*value.shape[:2], room, value.shape[3]), 7, value.dtype)
            buffers[name][:, :, :20] = value
            shared = ort.OrtValue.ortvalue_from_numpy(buffers[name])
            binding.bind_ortvalue_input(name, shared)
            binding.bind_ortvalue_output(name.replace("past", "present"), shared)
        else:
            binding.bind_cpu_input(name, value)
    binding.bind_output("y")
    opened.run_with_iobinding(binding)
    y = binding.get_outputs()[-1].numpy()
    order = [port.name.replace("present", "past") for port in CACHES[cache][0].outputs[1:]]
    assert_right([y, *(buffers[name][:, :, :23] for name in order)], given, heads, CACHES[cache][0])
    np.testing.assert_array_equal(y, apart[0])
    assert all((buffer[:, :, 23:] == 7).all() for buffer in buffers.values())


def test_a_row_that_sees_nothing_is_zero(cpu_library: Path) -> None:
    heads = HEADS["each its own"]
    given = feeds(heads, 2, 4, 6)
    given["mask"][1] = -np.inf
    y = session(cpu_library, heads).run(None, given)[0]
    assert np.isfinite(y).all()
    assert not y[1].any()
    assert y[0].any()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_cache_of_float16_has_what_is_finite_and_nan(
    kernels: str, cpu_library: Path, choose: Callable[[str], None]
) -> None:
    choose(kernels)
    heads = HEADS["each its own"]
    given = feeds(heads, 1, 1, 0, "float16")
    values = np.float32(
        [1e6, -7e4, 65504, 65519, np.nan, 6e-8, 3e-8, 2e-8, -0.0, 2**-14, 0.1, 1, 1.00048828125, 5, 6, 7]
    )
    given["value"][..., -16:] = values
    found = session(cpu_library, heads, "float16").run(None, given)[2][0, -1, 0]
    np.testing.assert_array_equal(found, np.clip(values, -65504, 65504).astype(np.float16))


@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_scales_belong_to_int8(cache: str, cpu_library: Path) -> None:
    heads = HEADS["each its own"]
    given = feeds(heads, 1, 1, 4, cache)
    names = [p.name for p in OP.inputs]
    node = helper.make_node(OP.name, names, ["y", "k", "v"], domain=DOMAIN, **attributes(heads))
    scale = np.ones((4, 16), np.float32)
    with pytest.raises(InvalidArgument, match="scales and a cache of int8 go together"):
        of_node(cpu_library, node, cache).run(None, given | {"key_scale": scale, "value_scale": scale})


@pytest.mark.parametrize("cache", CACHES)
def test_nan_stays_in_its_row(cache: str, cpu_library: Path) -> None:
    heads = HEADS["9 of 3"]
    given = feeds(heads, 2, 2, 300, cache)
    given["query"][1, 1, :64] = np.nan  # one query
    y = session(cpu_library, heads, cache).run(None, given)[0]
    assert np.isnan(y[1, 1, :64]).all()
    y[1, 1, :64] = 0
    assert np.isfinite(y).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_four_bits_do_not_hide_nan(kernels: str, cpu_library: Path, choose: Callable[[str], None]) -> None:
    """Nor what is infinite; zeros and small numbers are what they are, a token of one number is within half a step."""
    choose(kernels)
    heads = HEADS["each its own"]
    for value, wanted in ((np.nan, np.nan), (np.inf, np.nan), (0, 0), (1e-9, 0), (3, 3)):
        given = feeds(heads, 1, 2, 0, "four bits")
        given["value"] = given["value"].copy()
        given["value"][:, 0, -16:] = value  # of the first token's last head
        got = session(cpu_library, heads, "four bits").run(None, given)
        found = read_by_token(*got[4:])[0, -1, 0] @ hadamard(16)
        np.testing.assert_allclose(found, np.full(16, wanted), atol=abs(value) / 15 if np.isfinite(value) else 0)
        assert np.isfinite(got[0][..., :-16]).all()


WRONG: dict[str, tuple[str, Any, str]] = {
    "a row that ends behind its mask": (
        "last",
        np.int32([9, 10]),
        "row 1 has 4 new tokens of 4, the last at 10 under a mask of 10",
    ),
    "a row that ends before its new tokens": ("last", np.int32([9, 1]), "row 1 has 4 new tokens of 4, the last at 1"),
    "a row that ends nowhere": ("last", np.int32([-1, 9]), "row 0 has 4 new tokens of 4, the last at -1"),
    "more new tokens than there are": ("new", np.int32([4, 5]), "row 1 has 5 new tokens of 4"),
    "a position behind the tables": ("positions", np.full((2, 4), POSITIONS), f"position {POSITIONS} of {POSITIONS}"),
    "a position before them": ("positions", np.full((2, 4), -1), "position -1"),
    "a mask of other rows": ("mask", np.zeros((1, 1, 4, 10), np.float32), "mask is"),
    "a mask of other tokens": ("mask", np.zeros((2, 1, 3, 10), np.float32), "mask is"),
    "other values": ("past_value", np.zeros((2, 4, 7, 16), np.float32), "past_value is"),
    "heads of another size": ("key", np.zeros((2, 4, 90), np.float32), "key has 90 columns, expected 64 from 64 on"),
    "keys of other tokens": ("key", np.zeros((2, 3, 192), np.float32), r"key is \[2, 3, 192\], expected \[2, 4, ...\]"),
    "angles of more channels than a head has": (
        "cos",
        np.zeros((POSITIONS, 9), np.float32),
        "18 of a head's 16 channels",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str, cpu_library: Path) -> None:
    name, value, message = WRONG[case]
    given = feeds(HEADS["each its own"], 2, 4, 6) | {name: value}
    if name == "cos":
        given["sin"] = value
    with pytest.raises(InvalidArgument, match=message):
        session(cpu_library, HEADS["each its own"]).run(None, given)


WRONG_NIBBLES: dict[str, tuple[str, Any, str]] = {
    "scales of other tokens": ("past_key_scale", np.ones((2, 4, 5, 1), np.float16), "past_key_scale is"),
    "zero points of other groups": ("past_value_zero", np.ones((2, 4, 6, 2), np.uint8), "past_value_zero is"),
    "groups of eight": ("past_key_scale", np.ones((2, 4, 6, 2), np.float16), "16 channels in 2 groups"),
    "no groups": ("past_value_scale", np.ones((2, 4, 6, 0), np.float16), "16 channels in 0 groups"),
    "other values": ("past_value", np.zeros((2, 4, 6, 16), np.uint8), "past_value is"),
    "another center": ("center", np.zeros((4, 8), np.float32), "center is"),
}


@pytest.mark.parametrize("case", WRONG_NIBBLES)
def test_four_bits_that_do_not_fit_are_refused(case: str, cpu_library: Path) -> None:
    name, value, message = WRONG_NIBBLES[case]
    given = feeds(HEADS["each its own"], 2, 4, 6, "four bits") | {name: value}
    with pytest.raises(InvalidArgument, match=message):
        session(cpu_library, HEADS["each its own"], "four bits").run(None, given)
    if "groups" in message:
        with pytest.raises(ShapeError, match=message):
            BY_TOKEN.bind([given[p.name].shape for p in BY_TOKEN.inputs], {"heads": 4, "kv_heads": 4})


def test_heads_that_cannot_share_are_refused(cpu_library: Path) -> None:
    with pytest.raises(RuntimeException, match="9 heads cannot share 2"):
        session(cpu_library, (9, 2, 16, 16))
    shapes = [v.shape for v in feeds((9, 3, 64, 64), 1, 2, 3).values()]
    assert OP.bind(shapes, {"heads": 9, "kv_heads": 3}) == ((1, 2, 576), (1, 3, 5, 64), (1, 3, 5, 64))
    with pytest.raises(ShapeError, match="9 heads cannot share 2"):
        OP.bind(shapes, {"heads": 9, "kv_heads": 2})


def test_sizes_that_overflow_are_refused(cpu_library: Path) -> None:
    """2^60 heads of 16 and two of keys and values are 2^64 + 32 channels."""
    with pytest.raises(RuntimeException, match="heads is 1152921504606846976"):
        session(cpu_library, HEADS["one"], heads=1 << 60, kv_heads=1)


def test_no_instruction_leaves_its_file(cpu_library: Path) -> None:
    """The linker takes one of several copies of a weak function: one with instructions that a CPU may not have."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not on PATH")
    for name in ("avx512", "avxvnni", "avx2"):
        done = subprocess.run(
            ["nm", "-C", str(cpu_library.parent / f"{name}.cpp.o")], capture_output=True, text=True, check=True
        )
        assert "cpu::" in done.stdout
        assert [line for line in done.stdout.splitlines() if line[17:18] in "WVu"] == []
