"""Old opsets: each form that an operator has had computes what it did, or is refused by name.

The table of forms covers every operator that has changed since ONNX Runtime's oldest opset. The original runs on ONNX
Runtime as it is, beside what the conversion made of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import load, opset
from instantrt.compiler.frontend.compare import compared, outputs
from instantrt.compiler.frontend.model import OPSET
from instantrt.compiler.frontend.opset import OLDEST, at_opset
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from tests.compiler.opset_cases import CASES, LAST, Case, Const

# Of these there is nothing to run: what they say is random, or no tensor, or a graph, or a quantized model; or ONNX
# Runtime has no kernel at OPSET, which is asked of every artifact.
RANDOM = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
GRAPHS = {"If", "Loop", "Scan"}
NO_TENSORS = {"Constant", "OptionalGetElement", "OptionalHasElement"}
QUANTIZED = {"DequantizeLinear", "QLinearMatMul", "QuantizeLinear"}
NO_KERNEL = {"GlobalLpPool", "MaxRoiPool", "RoiAlign"}
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def versions() -> dict[str, list[int]]:
    """Standard operators -> the opsets up to OPSET at which they changed."""
    found: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= OPSET:
            found.setdefault(schema.name, set()).add(schema.since_version)
    return {name: sorted(since) for name, since in found.items()}


VERSIONS = versions()


def opsets(case: Case) -> list[int]:
    """The first opset of each form in which the case is valid."""
    since = {max(case.first, *(v for v in VERSIONS[case.op] if v <= n)) for n in range(case.first, case.last + 1)}
    return sorted(since)


def model_of(case: Case, version: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    inputs, constants, feeds, names = [], [], {}, []
    for i, value in enumerate(case.inputs):
        name = "" if value is None else f"x{i}"
        names.append(name)
        if isinstance(value, Const):
            constants.append(numpy_helper.from_array(value.value, name))
        elif value is not None:
            array = feeds[name] = np.asarray(value)
            kind = onnx.TensorProto.STRING if array.dtype == object else helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
    made = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(case.outputs)]
    node = helper.make_node(case.op, names, [y.name for y in made], name="it", **case.attributes)
    graph = helper.make_graph([node], "g", inputs, made, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=10), feeds


def equal(got: list[Any], want: list[Any]) -> bool:
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(got, want, strict=True)]
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and (np.allclose(a, b, 1e-4, 1e-6, equal_nan=True) if a.dtype.kind in "fc" else bool((a == b).all()))
        for a, b in pairs
    )


def test_every_operator_that_changed_has_a_case() -> None:
    changed = {name for name, since in VERSIONS.items() if any(v > OLDEST for v in since) and len(since) > 1}
    assert changed - {op for op, _ in CASES} == RANDOM | GRAPHS | NO_TENSORS | QUANTIZED | NO_KERNEL


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted({op for op, _ in CASES}))
def test_what_an_operator_said_is_kept(op: str) -> None:
    for (_, label), case in ((key, case) for key, case in CASES.items() if key[0] == op):
        for version in opsets(case):
            model, feeds = model_of(case, version)
            names = [y.name for y in model.graph.output]
            (want,) = outputs(model, names, feeds)
            notes = at_opset(model, Path("m.onnx"))
            assert model.opset_import[0].version == OPSET
            assert equal(outputs(model, names, feeds)[0], want), (label, version)
            assert not notes or label == "at run time" or op == "DFT", (label, version, notes)


def test_the_cases_reach_the_last_opset() -> None:
    assert LAST == OPSET - 1


def text(body: str, version: int, signature: str = "(float[b, 4] x) => (float[b, 4] y)") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {version}]> g {signature} {{ {body} }}')


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def check_compiled(model: onnx.ModelProto, folder: Path) -> None:
    path = saved(model, folder)
    (artifact,) = compile_model(Request(path, ("x86",), folder / "out", quant="none"))
    want, got = (
        ort.InferenceSession(each, providers=["CPUExecutionProvider"]).run(None, {"x": X})
        for each in (path, folder / "out" / artifact.path)
    )
    assert equal(got, want)


HARDMAX = "Hardmax <axis = 0> (%s)"  # all elements are one row, until opset 13
ZERO = "zero = Constant <value_float = 0.0> () e = ReduceMax <keepdims = 0> (x) c = Greater(e, zero)"
BODIES = {
    "branch": f"""{ZERO} y = If(c) <then_branch = a () => (float[b, 4] p) {{ p = {HARDMAX % "x"} }},
        else_branch = d () => (float[b, 4] q) {{ q = Neg(x) }}>""",
    "branch of a branch": f"""{ZERO} y = If(c) <then_branch = a () => (float[b, 4] p) {{ r = Add(x, zero)
        p = If(c) <then_branch = f () => (float[b, 4] s) {{ s = {HARDMAX % "r"} }},
                   else_branch = h () => (float[b, 4] t) {{ t = Neg(r) }}> }},
        else_branch = d () => (float[b, 4] q) {{ q = Neg(x) }}>""",
    "loop": f"""n = Constant <value = int64 {{3}}> () y = Loop(n, , x) <body = one (int64 i, bool c, float[b, 4] p) =>
        (bool d, float[b, 4] q) {{ d = Identity(c) r = {HARDMAX % "p"} q = Add(r, x) }}>""",
    "scan": """z = Constant <value_float = 0.0> () s, y = Scan <num_scan_inputs = 1,
        body = one (float s0, float[4] v) => (float s1, float[4] w)
        { m = ReduceMax <keepdims = 0> (v) s1 = Add(s0, m) w = Softmax <axis = 0> (v) }> (z, x)""",
}


@pytest.mark.parametrize("name", BODIES)
def test_graphs_within_are_converted(name: str, tmp_path: Path) -> None:
    model = text(BODIES[name], 12)
    if name == "scan":
        del model.graph.output[1:]
    check_compiled(model, tmp_path)


def test_a_function_is_converted_with_the_model(tmp_path: Path) -> None:
    head = '<ir_version: 8, opset_import: ["": 12, "my": 1]> g (float[b, 4] x) => (float[b, 4] y) { y = my.f(x) }'
    function = f'<domain: "my", opset_import: ["": %d]> f (a) => (o) {{ o = {HARDMAX % "a"} }}'
    check_compiled(onnx.parser.parse_model(f"{head} {function % 12}"), tmp_path)
    path = saved(onnx.parser.parse_model(f"{head} {function % 17}"), tmp_path)
    with pytest.raises(UserError, match=r"function f: a local function is of another opset[^$]*opset 12[^$]*opset 17"):
        load(path)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_both_names_of_the_standard_domain(domain: str, tmp_path: Path) -> None:
    model = text(f"y = {HARDMAX % 'x'}", 12)
    model.opset_import[0].domain = model.graph.node[0].domain = domain
    check_compiled(model, tmp_path)


def test_weights_of_old_files_are_inputs_too(tmp_path: Path) -> None:
    model = text("v = Reshape(w, s) y = MatMul(x, v)", 8, "(float[b, 4] x, float[16] w, int64[2] s) => (float[b, 4] y)")
    model.ir_version = 3
    for name, values in (("w", np.arange(16, dtype=np.float32)), ("s", np.array([4, 4]))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    check_compiled(model, tmp_path)


@pytest.mark.parametrize("version", [24, 25, 26, 27, 28])
def test_newer_opsets(version: int, tmp_path: Path) -> None:
    check_compiled(text("z = Cast <to = 7> (x) w = Cast <to = 1> (z) y = Softmax(w)", version), tmp_path)


def test_operators_of_onnx_runtime_need_no_opset(tmp_path: Path) -> None:
    check_compiled(text("y = com.microsoft.Gelu(x)", 17), tmp_path)


@pytest.mark.parametrize(
    ("body", "version", "says"),
    [
        ("y = Relu(x)", 6, r"the model's opset cannot be compiled\n.*7 to .*\n  found:    6"),
        ("y = Relu(x)", 99, r"the model's opset cannot be compiled\n.*\n  found:    99"),
        ("y = Gelu(x)", 17, "node y: the model cannot be brought to opset 23: Gelu is an operator that its opset does"),
        ("y = SwiGLU(x)", 28, "SwiGLU is an operator that its opset does not have"),
        ('["drop"] z, y = Dropout(x)', 10, r"node drop: .* Dropout is an operator that does not survive"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(body: str, version: int, says: str, tmp_path: Path) -> None:
    model = text(body, version)
    with pytest.raises(UserError, match=says):
        at_opset(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("imports", [[], [("", 12), ("ai.onnx", 17)]])
def test_a_model_of_no_or_two_opsets_is_refused(imports: list[tuple[str, int]], tmp_path: Path) -> None:
    model = text("y = Relu(x)", 12)
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*each) for each in imports)
    with pytest.raises(UserError, match="opset"):
        load(saved(model, tmp_path))


def test_nearest_pixels_that_two_opsets_choose_otherwise_are_refused() -> None:
    """ONNX Runtime rounds up in opset 10 where a picture gets smaller; nothing that is said today does both."""
    smaller = Case("Resize", (X[None, None], Const(np.float32([1, 1, 0.6, 0.6]))), {"mode": "nearest"}, 10, 10, 1)
    with pytest.raises(UserError, match="Resize is an operator that does not survive the conversion"):
        at_opset(model_of(smaller, 10)[0], Path("m.onnx"))


WRONG = [
    ("Resize", "linear, opset 10"),
    ("Upsample", "linear, input"),
    ("Hardmax", "axis 1"),
    ("GroupNormalization", ""),
]


@pytest.mark.parametrize("key", WRONG)
def test_without_its_rule_a_node_is_refused(key: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installed converter makes of these is something else, and is seen."""
    monkeypatch.setattr(opset, "RULES", {})
    with pytest.raises(UserError, match=f"node it: .*{key[0]} is an operator that does not survive"):
        at_opset(model_of(CASES[key], CASES[key].first)[0], Path("m.onnx"))


def test_an_output_that_nobody_reads_is_not_compared() -> None:
    """Old exports name Dropout's mask, whose type and values are others today."""
    model, feeds = model_of(CASES["Dropout", "ratio"], 10)
    (want,) = outputs(model, ["y0"], feeds)
    model.graph.node[0].output.append("mask")
    at_opset(model, Path("m.onnx"))
    assert equal(outputs(model, ["y0"], feeds)[0], want)


def test_statistics_of_training_are_refused() -> None:
    """With five outputs ONNX Runtime normalizes by the batch, as opset 9 says; nobody has to read them."""
    model, _ = model_of(CASES["BatchNormalization", ""], 9)
    model.graph.node[0].output.extend(["mean", "var", "saved_mean", "saved_var"])
    with pytest.raises(UserError, match="BatchNormalization"):
        at_opset(model, Path("m.onnx"))


def alone(body: str, version: int = 17) -> onnx.ModelProto:
    return text(body, version, "(float[b, 4] i0) => (float[b, 4] o0)")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("o0 = Softmax <axis = 0> (i0)", "values that are off by up to"),
        ("o0 = Cast <to = 7> (i0)", "int64 .* where float32"),
        ("o0 = ReduceMax(i0)", "float32 .*1, 1.* where"),
        ("k = Constant <value_ints = [7]> () o0 = Expand(i0, k)", "ONNXRuntimeError"),
    ],
)
def test_a_difference_is_said_in_words(other: str, says: str) -> None:
    finding = compared(alone("o0 = Softmax(i0)"), alone(other), 1)
    assert finding.differs
    assert re.search(says, finding.reason)


def test_what_cannot_run_is_not_called_different() -> None:
    for old, new in (("Softmax(i0)", "GlobalLpPool(i0)"), ("Reshape(i0, i0)", "Neg(i0)")):
        finding = compared(alone(f"o0 = {old}", 22), alone(f"o0 = {new}", 22), 1)
        assert not finding.differs
        assert finding.reason
