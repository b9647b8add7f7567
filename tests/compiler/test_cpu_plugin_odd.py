"""Kernels of ours on CPUs in odd models and beside other artifacts: right, or refused in words; never a crash."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from instantrt import load_artifact
from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import PACKAGED_PLUGINS, Request
from instantrt.compiler.target import CPU_PLUGIN
from instantrt.passes.core.errors import UserError
from instantrt.plugins.cpu_gemm.attention import OP
from instantrt.plugins.ops import DOMAIN
from instantrt.plugins.schema import Array, DType
from tests.commands import invoke
from tests.conftest import TINY

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


ALONE = """
import sys
import numpy as np
import onnxruntime as ort
library, model, feeds = sys.argv[1:]
options = ort.SessionOptions()
options.register_custom_ops_library(library)
ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, dict(np.load(feeds)))
"""


def test_sizes_that_overflow_are_refused(tmp_path: Path) -> None:
    """2^60 heads of 16 and two of keys and values: 2^64 + 32 channels. A process of its own once died of it."""
    empty = np.zeros((1, 1, 0, 16), np.float32)
    qkv = np.zeros((1, 3, 32), np.float32)
    feeds = inputs(3, 0, [2], [3], qkv=qkv, past_key=empty, past_value=empty, positions=np.zeros((1, 3), np.int64))
    (tmp_path / "m.onnx").write_bytes(model(feeds, heads=1 << 60, kv_heads=1))
    np.savez(tmp_path / "feeds.npz", **feeds)
    words = [sys.executable, "-c", ALONE, LIBRARY, tmp_path / "m.onnx", tmp_path / "feeds.npz"]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert "heads is 1152921504606846976" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("inner", "nodes"),
    [
        pytest.param("a", "a = MatMul(x, w) y = Add(a, x)", id="a residual"),
        pytest.param("a", "a = MatMul(x, w) y = Add(a, b)", id="a bias"),
        pytest.param("a", "a = MatMul(x, w) s = Sigmoid(a) y = Mul(a, s)", id="SiLU"),
        pytest.param("s", "a = MatMul(x, w) s = Sigmoid(a) y = Mul(a, s)", id="the sigmoid of SiLU"),
        pytest.param("a", "a = MatMul(x, w) y = Gelu(a)", id="GELU"),
        pytest.param("g", "a = MatMul(x, w) s = Sigmoid(a) g = Mul(a, s) u = MatMul(x, v) y = Mul(g, u)", id="a gate"),
    ],
)
def test_what_a_model_says_of_its_inside_stays(inner: str, nodes: str, tmp_path: Path) -> None:
    """An output of the model that a product would otherwise have gone on from by itself."""
    head = '<ir_version: 10, opset_import: ["": 21]> one (float[n, 64] x) => (float[n, 64] y, '
    model = onnx.parser.parse_model(f"{head}float[n, 64] {inner}) {{ {nodes} }}")
    random = np.random.default_rng(0)
    for name, sizes in {"w": (64, 64), "v": (64, 64), "b": (64,)}.items():
        values = 0.2 * random.standard_normal(sizes).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "m.onnx")
    request = Request(tmp_path / "m.onnx", ("x86",), tmp_path / "out", quant="a16w8", plugin=LIBRARY)
    compile_model(request)
    x = random.standard_normal((5, 64)).astype(np.float32)
    expected = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    loaded = load_artifact(tmp_path / "out")
    for got, wanted in zip(loaded.session.run(None, {"x": x}), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())


def test_beside_a_target_without_kernels(tmp_path: Path) -> None:
    """Each is held against a twin that went on with its own bits; and diff lowers each as it was."""
    targets, out = ("--target", "x86", "--target", "armv9"), tmp_path / "out"
    said = invoke("compile", TINY, *targets, "--quant", "a16w4", "--plugin", LIBRARY, "-o", out)
    assert said.exit_code == 0
    assert "armv9: ran" in said.output
    assert "amplifies" not in said.output
    found = invoke("diff", out, "--model", TINY, "--bisect", "--target", "x86")
    assert found.exit_code == 0, found.output


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plugin library here"):
        Request(TINY, ("x86",), tmp_path, quant="a16w4", plugin=tmp_path / "missing.so")
