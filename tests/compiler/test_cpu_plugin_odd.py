"""CpuAttention of models that no pass of ours writes: right as its definition says, or refused; never a crash."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from instantrt.compiler.request import PACKAGED_PLUGINS
from instantrt.compiler.target import CPU_PLUGIN
from instantrt.plugins.cpu_gemm.attention import OP
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import Array, DType

ELEMENTS = {DType.F32: TensorProto.FLOAT, DType.I32: TensorProto.INT32, DType.I64: TensorProto.INT64}
TYPES = [ELEMENTS[kind] for kind in OP.types[0]]
HEADS, KV_HEADS, SIZE, POSITIONS = 4, 2, 32, 64
LIBRARY = PACKAGED_PLUGINS / CPU_PLUGIN

pytestmark = pytest.mark.skipif(not LIBRARY.is_file(), reason=f"`make plugins-cpu` makes {CPU_PLUGIN}")


def model(feeds: Mapping[str, Array], heads: int, kv_heads: int) -> bytes:
    """One node with inputs of any size."""
    ranks = [*(array.ndim for array in feeds.values()), 3, 4, 4]
    names = [port.name for port in (*OP.inputs, *OP.outputs)]
    infos = [
        helper.make_tensor_value_info(name, kind, [None] * rank)
        for name, kind, rank in zip(names, TYPES, ranks, strict=True)
    ]
    count = len(OP.inputs)
    attrs: dict[str, Any] = OP.attributes({"heads": heads, "kv_heads": kv_heads})
    node = helper.make_node(OP.name, names[:count], names[count:], domain=DOMAIN, **attrs)
    graph = helper.make_graph([node], "one", infos[:count], infos[count:])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, OP.version)]
    written: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return written


def run(feeds: Mapping[str, Array], heads: int = HEADS, kv_heads: int = KV_HEADS) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    session = ort.InferenceSession(model(feeds, heads, kv_heads), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, dict(feeds))
    return outputs


def inputs(tokens: int, past: int, last: list[int], new: list[int], **others: Any) -> dict[str, Array]:
    """Of a mask that hides nothing, so that what is seen is the operator's own doing."""
    random, rows = np.random.default_rng(0), len(last)

    def normal(*sizes: int) -> Array:
        return random.standard_normal(sizes).astype(np.float32)

    columns = max(past, tokens)
    given: dict[str, Array] = {
        "qkv": normal(rows, tokens, (HEADS + 2 * KV_HEADS) * SIZE),
        "past_key": normal(rows, KV_HEADS, past, SIZE),
        "past_value": normal(rows, KV_HEADS, past, SIZE),
        "last": np.array(last, np.int32),
        "cos": normal(POSITIONS, SIZE // 4),
        "sin": normal(POSITIONS, SIZE // 4),
        "positions": random.integers(0, POSITIONS, (rows, tokens)),
        "mask": np.zeros((rows, 1, tokens, columns), np.float32),
        "new": np.array(new, np.int32),
    }
    return given | others


@pytest.mark.parametrize(
    ("tokens", "past", "last", "new"),
    [
        pytest.param(3, 0, [2, 2], [3, 3], id="a prompt"),
        pytest.param(9, 40, [30, 20], [9, 4], id="pieces, one padded behind"),
        pytest.param(40, 60, [59, 39], [40, 40], id="many tokens"),
        pytest.param(1, 600, [599, 300], [1, 1], id="one token of a long cache"),
        pytest.param(1, 600, [599, 300], [0, 1], id="padding alone, in a long cache"),
        pytest.param(1, 40, [30, 20], [1, 0], id="padding alone"),
    ],
)
def test_a_token_sees_none_behind_itself(tokens: int, past: int, last: list[int], new: list[int]) -> None:
    feeds = inputs(tokens, past, last, new)
    expected = OP.reference(*feeds.values(), heads=HEADS, kv_heads=KV_HEADS)
    for got, wanted in zip(run(feeds), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"last": np.array([2, -1], np.int32)}, "row 1 has 3 new tokens of 3, the last at -1 under a mask of 3"),
        ({"new": np.array([3, 4], np.int32)}, "row 1 has 4 new tokens of 3"),
        ({"cos": np.zeros((9, 17), np.float32)}, "34 of a head's 32 channels are to be rotated"),
        ({"past_key": np.zeros((2, 2, 0, 24), np.float32)}, "a head has 24 channels, expected a multiple of 16"),
        ({"mask": np.zeros((1, 1, 3, 3), np.float32)}, r"mask is \[1, 1, 3, 3\], expected \[2, 1, 3, 3\]"),
        ({"positions": np.full((2, 3), -1)}, "position -1 of 64"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Array], says: str) -> None:
    with pytest.raises(Exception, match=says):
        run(inputs(3, 0, [2, 2], [3, 3]) | changed)


CRASHED = """
import numpy as np
from tests.compiler.test_cpu_plugin_odd import inputs, run
empty = np.zeros((1, 1, 0, 16), np.float32)
qkv = np.zeros((1, 3, 32), np.float32)  # 2^60 heads and two of keys and values, of 16: 2^64 + 32 channels
try:
    run(inputs(3, 0, [2], [3], qkv=qkv, past_key=empty, past_value=empty), heads=1 << 60, kv_heads=1)
except Exception as error:
    assert "heads is 1152921504606846976" in str(error), error
else:
    raise AssertionError("it ran")
"""


def test_sizes_that_overflow_are_refused() -> None:
    """In a process of its own, which once died of it."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CRASHED], cwd=root, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
