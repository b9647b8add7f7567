"""The cache as integers: what its scales are, that every form of it is the twin's, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler.cache_type import bound, check_target, scale_of, with_cache
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request, refuse_of_llm
from instantrt.compiler.serving.runtime.onnx_engine import ENGINES, Array
from instantrt.compiler.smoke.compare import distance
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.steps import Call
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.names import PAST
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.ort.attention import attention
from instantrt.passes.ort.rotary import RotateInAttention
from instantrt.passes.qdq.quantize_cache_by_token import QuantizeCacheByToken
from tests.compiler.rows import PROMPT, rows_of
from tests.conftest import TINY
from tests.graphs import evaluate, relative

RANDOM = np.random.default_rng(0)
LENGTH = 16


@pytest.mark.parametrize("pairs", [(np.array([0, 1]), np.array([2, 3])), (np.array([0, 2]), np.array([1, 3]))])
def test_a_bound_holds_wherever_the_pair_is_turned(pairs: tuple[Array, Array]) -> None:
    """And is reached: what is bounded is the length of each pair; a channel that is not turned has its own."""
    start = RANDOM.standard_normal((1, 2, 1, 5)).astype(np.float32)
    first, second = (start[..., index] for index in pairs)
    turned = np.repeat(start, 1000, axis=2)
    angles = np.linspace(0, 2 * np.pi, 1000)[:, None]
    turned[..., pairs[0]] = first * np.cos(angles) - second * np.sin(angles)
    turned[..., pairs[1]] = first * np.sin(angles) + second * np.cos(angles)
    found = bound(start, [pairs])
    np.testing.assert_allclose(np.abs(turned).max(axis=(0, 2)), found, rtol=1e-4)
    np.testing.assert_array_equal(bound(np.zeros((1, 1, 2, 2)), []), 1)


def test_scales_are_exact_in_every_compute_type() -> None:
    scale = scale_of(np.geomspace(1e-9, 1e4, 99).astype(np.float32))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(scale[scale > 1e-4].astype(dtype).astype(np.float32), scale[scale > 1e-4])
        assert (scale.astype(dtype) > 0).all()
    np.testing.assert_allclose(scale[-1], 2 * 1e4 / 127, rtol=2**-8)


@pytest.fixture(scope="module")
def feeds() -> dict[str, Array]:
    ids = RANDOM.integers(0, 4000, (2, PROMPT))
    ones = np.ones_like(ids)
    ones[1, :5] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": ones, "position_ids": np.maximum(np.cumsum(ones, axis=1) - 1, 0)}


@pytest.fixture(scope="module", params=["int8", "uint4"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def twin(kind: str, tiny_float: FloatModel) -> Any:
    return with_cache(tiny_float.graph.copy(), kind, tiny_float, LENGTH, PassLog())


def empty(graph: Any, rows: int) -> dict[str, Array]:
    caches = (t for t in graph.inputs if t.name.startswith(PAST))
    return {t.name: np.zeros((rows, t.shape[1], 0, t.shape[3]), t.dtype) for t in caches}


def test_the_twin_is_near_the_float_model(
    kind: str, twin: Any, tiny_float: FloatModel, feeds: dict[str, Array], tmp_path: Path
) -> None:
    """Nearer than a step, and not as near as if nothing were quantized."""
    (tmp_path / "float").mkdir()
    want = evaluate(tiny_float.graph.copy(), feeds | empty(tiny_float.graph, 2), tmp_path / "float")[0]
    got = evaluate(twin.copy(), feeds | empty(twin, 2), tmp_path)[0]
    low, high = {"int8": (1e-3, 3e-2), "uint4": (1e-2, 2e-1)}[kind]
    assert low < relative(got[0], want[0]) < high


def test_group_query_attention_has_the_same_cache_and_answers(
    twin: Any, kind: str, feeds: dict[str, Array], tmp_path: Path
) -> None:
    """It rotates and rounds by itself, in rows that are padded, too; four bits it has only where ours follow."""
    lowered = run(twin.copy(), [*attention(), RotateInAttention(LENGTH)], PassLog())
    made = [node for node in lowered.nodes if node.op == "GroupQueryAttention"]
    assert len(made) == (4 if kind == "int8" else 0)
    if not made:
        lowered = run(twin.copy(), [*attention(by_token=True), RotateInAttention(LENGTH)], PassLog())
        made = [node for node in lowered.nodes if node.op == "GroupQueryAttention"]
        assert [len(node.inputs) for node in made] == [21] * 4
        assert all(node.inputs[12].name.endswith("/center") for node in made)
        return
    assert {node.inputs[3].dtype for node in made} == {np.dtype(np.int8)}
    assert all(node.attrs["do_rotary"] for node in made)
    (tmp_path / "twin").mkdir()
    want = evaluate(twin.copy(), feeds | empty(twin, 2), tmp_path / "twin")
    got = evaluate(lowered, feeds | empty(lowered, 2), tmp_path)
    assert relative(got[0][0], want[0][0]) < 1e-3
    assert relative(got[0][1, 5:], want[0][1, 5:]) < 1e-3
    for output, found, expected in zip(twin.outputs[1:], got[1:], want[1:], strict=True):
        assert distance("", output.name, found[0], expected[0]).within(1e-4)


ONE_HEAD = """
    graph (float[1,1,s,32] q, float[1,1,s,32] k, float[1,1,s,32] v,
        float[1,1,p,32] "past_key_values.0.key", float[1,1,p,32] "past_key_values.0.value", float[1,1,s,t] mask)
        => (float[1,1,s,32] y, float[1,1,t,32] "present.0.key", float[1,1,t,32] "present.0.value") {
        "present.0.key" = Concat <axis: int = 2> ("past_key_values.0.key", k)
        "present.0.value" = Concat <axis: int = 2> ("past_key_values.0.value", v)
        y = Attention <scale: float = 0.2, ATTRS> (q, "present.0.key", "present.0.value", mask)
    }"""


def test_what_all_keys_have_in_common_costs_no_codes_and_changes_nothing(tmp_path: Path) -> None:
    """But where scores are capped one by one: there it is seen."""
    q, k, v = (RANDOM.standard_normal((1, 1, 24, 32)).astype(np.float32) for _ in "qkv")
    common = np.float32(30) * RANDOM.standard_normal((1, 32)).astype(np.float32)
    mask = np.where(np.tri(24, dtype=bool), np.float32(0), np.float32(-1e9))[None, None]

    def attended(name: str, attrs: str, passes: list[Any]) -> Array:
        opset = [onnx.helper.make_opsetid("", 23)]
        text = ONE_HEAD.replace("ATTRS", attrs)
        graph = run(
            gs.import_onnx(onnx.helper.make_model(onnx.parser.parse_graph(text), opset_imports=opset)),
            passes,
            PassLog(),
        )
        (tmp_path / name).mkdir()
        given = {"q": q, "k": k + common, "v": v, "mask": mask}
        return evaluate(graph, given | empty(graph, 1), tmp_path / name)[0]

    plain, centered = (QuantizeCacheByToken(centers) for centers in ({}, {"0.key": common}))
    want = attended("float", "is_causal: int = 0", [])
    assert relative(attended("plain", "is_causal: int = 0", [plain]), want) > 0.3
    assert relative(attended("centered", "is_causal: int = 0", [centered]), want) < 0.15
    capped = attended("capped", "softcap: float = 5.0", [plain])
    np.testing.assert_array_equal(attended("capped, centered", "softcap: float = 5.0", [centered]), capped)


def test_the_twin_goes_on_with_the_codes_of_another_form(twin: Any, feeds: dict[str, Array]) -> None:
    """A last bit that turns one is held against its own; what reads it must make of it what the twin makes of it."""
    step, key = Call("prefill", feeds | empty(twin, 2)), "present.0.key"
    own = lockstep(twin, [step])["prefill"]
    other = lockstep(twin, [step], given={"prefill": {key: own[key] ^ 1}})["prefill"]
    np.testing.assert_array_equal(other[key], own[key])
    assert relative(other["logits"], own["logits"]) > 1e-4


@pytest.mark.parametrize("output", ["present.0.key", "present.0.key_zero"])
def test_codes_are_compared_as_numbers(output: str) -> None:
    """A tie that falls to the other side is no error; a scale that is 1 % off is one."""
    scale = 0.03
    values = RANDOM.standard_normal((1, 2, 64, 64))
    codes = np.rint(values / scale).astype(np.int8)
    turned = codes.copy()
    turned[0, 0, 0, 0] += 1
    assert distance("", "present.0.key", turned, codes).within(1e-4)
    assert not distance("", "present.0.key", np.rint(values / (1.01 * scale)).astype(np.int8), codes).within(1e-3)
    bytes_ = RANDOM.integers(0, 256, (1, 2, 64, 32)).astype(np.uint8)
    upper = bytes_.copy()
    upper[..., :2] ^= 16  # a step of each upper code, not sixteen of a byte
    found = distance("", output, upper, bytes_)
    assert found.largest == (1 if output.endswith("key") else 16)


@pytest.mark.slow
def test_the_runtime_decodes_in_a_cache_of_the_artifacts_types(tmp_path: Path) -> None:
    """In one buffer and in one that grows: near the float32 cache, and smaller."""
    found: dict[str, tuple[list[Array], int]] = {}
    for name, given in {
        "float32": {},
        "shared": {"kv_cache_type": "int8"},
        "portable": {"kv_cache_type": "int8", "portable": True},
        "uint4": {"kv_cache_type": "uint4"},
    }.items():
        (artifact,) = compile_model(Request(TINY, ("x86",), tmp_path / name, **given))
        engine = ENGINES[artifact.limits["cache"]](tmp_path / name / artifact.path, 2, LENGTH, 1)
        token = sum(np.dtype(t.dtype).itemsize * int(t.shape[1]) * int(t.shape[3]) for t in artifact.inputs[3:])
        found[name] = rows_of(engine), token
        engine.close()
    want, size = found["float32"]
    for name, (most, share) in {"shared": (3e-2, 0.25), "portable": (3e-2, 0.25), "uint4": (0.2, 0.16)}.items():
        got, bytes_ = found[name]
        off = [relative(a, b) for a, b in zip(got, want, strict=True)]
        assert 1e-4 < max(off) < most, (name, off)
        assert bytes_ <= share * size
    for a, b in zip(found["shared"][0], found["portable"][0], strict=True):
        assert relative(a, b) < 1e-3


@pytest.mark.parametrize(
    ("kind", "growth", "target", "dtype", "says"),
    [
        ("float16", "concat", "x86", None, "no float16 cache on a CPU"),
        ("uint4", "concat", "sm89", np.float16, "no uint4 cache in this engine"),
        ("float32", "concat", "sm89", np.float16, "no float32 cache in this engine"),
        ("float16", "concat", "sm89", ml_dtypes.bfloat16, "no float16 cache in this engine"),
        ("int8", "in-place", "sm89", np.float16, "no int8 cache in place in an engine"),
    ],
)
def test_what_a_target_has_no_cache_of_is_refused(kind: str, growth: str, target: str, dtype: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_target(kind, growth, find_target(target), None if dtype is None else np.dtype(dtype))


def test_what_is_taken_and_what_has_no_cache() -> None:
    for kind in (None, "float32", "int8", "uint4"):
        check_target(kind, "concat", find_target("x86"), None)
    for kind in (None, "float16", "int8"):
        check_target(kind, "concat", find_target("sm89"), np.dtype(np.float16))
    request = Request(Path("m"), ("x86",), Path("o"), kv_cache_type="int8")
    with pytest.raises(UserError, match="does nothing without a causal LM"):
        refuse_of_llm(request)


def test_a_cache_that_something_else_reads_is_refused(tiny_float: FloatModel) -> None:
    graph = tiny_float.graph.copy()
    present = next(t for t in graph.outputs if t.name == "present.1.value")
    graph.nodes.append(gs.Node("Identity", "other", inputs=[present], outputs=[gs.Variable("other")]))
    with pytest.raises(UserError, match="this cache cannot be uint4") as caught:
        with_cache(graph, "uint4", tiny_float, LENGTH, PassLog())
    assert caught.value.where == "past_key_values.1.value"
