"""ONNX files as input: an encoder, our own LLM export, inline and external weights, and hostile external data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
import torch
from transformers import BertConfig, BertModel

from instantrt.compiler.accuracy.runners import session
from instantrt.compiler.artifact.digest import sha256
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.onnx_file import artifact_graph
from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from tests.conftest import TINY, planned_and_written
from tests.graphs import compiled_error, first_output, model_file, relative

FEEDS = {"input_ids": np.array([[5, 7, 9, 11]]), "attention_mask": np.ones((1, 4), np.int64)}


@pytest.fixture(scope="module")
def exported() -> torch.onnx.ONNXProgram:
    """A tiny BERT as torch exports it, opset 18, at which block-wise quantization does not exist."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    torch.manual_seed(0)
    config = BertConfig(**sizes, vocab_size=99, attn_implementation="eager")
    model = BertModel(config, add_pooling_layer=False).eval()
    inputs = tuple(torch.from_numpy(v) for v in FEEDS.values())
    program = torch.onnx.export(
        model, inputs, input_names=list(FEEDS), output_names=["hidden"], opset_version=18, dynamo=True, verbose=False
    )
    assert program is not None
    return program


@pytest.fixture(scope="module", params=["inline", "external"])
def bert(
    request: pytest.FixtureRequest, exported: torch.onnx.ONNXProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    exported.save(folder / "bert.onnx", external_data=request.param == "external")
    assert (folder / "bert.onnx.data").exists() == (request.param == "external")
    return folder / "bert.onnx"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant", "group", "bound"), [("a16w8", None, 5e-3), ("a16w4", 32, 1e-1), ("none", None, 1e-6)]
)
def test_an_encoder_compiles(bert: Path, tmp_path: Path, quant: str, group: int | None, bound: float) -> None:
    planned = planned_and_written(Request(bert, ("x86",), tmp_path, quant=quant, group_size=group))
    quantized = planned.twins["x86"].quantized
    assert len(quantized) == (0 if quant == "none" else 12)
    assert relative(first_output(tmp_path / "x86/model.onnx", FEEDS), first_output(bert, FEEDS)) < bound
    files = json.loads((tmp_path / "manifest.json").read_text())["artifacts"][0]["source"]["files"]
    assert files == {path.name: sha256(path) for path in bert.parent.iterdir()}


@pytest.mark.slow
def test_our_own_float_export_compiles_again(tmp_path: Path) -> None:
    """Hugging Face -> float ONNX -> quantized ONNX gives the same weights as the direct road."""
    compile_model(Request(TINY, ("x86",), tmp_path / "float", quant="none", portable=True))
    exported = load(tmp_path / "float/x86/model.onnx")
    assert exported.llm is not None
    assert (exported.llm.layers, exported.llm.kv_heads, exported.llm.vocab) == (4, 2, 4096)
    (logits,) = (t for t in exported.graph.outputs if t.name == "logits")
    assert logits.shape[1] != 1  # of every token: a budget, --verify and --logits all need them
    twice = Request(tmp_path / "float/x86/model.onnx", ("x86",), tmp_path / "twice", quant="a16w8")
    planned = planned_and_written(twice)
    direct = planned_and_written(Request(TINY, ("x86",), tmp_path / "direct", quant="a16w8"))
    kinds = [{path: str(d) for path, d in p.twins["x86"].decisions.items()} for p in (planned, direct)]
    assert kinds[0] == kinds[1]
    codes = [initializers(tmp_path / f"{name}/x86/model.onnx", r"proj\)?\.b$") for name in ("twice", "direct")]
    assert len(codes[0]) == 16  # in each of four layers: q, k and v; o; gate and up; down
    assert all((codes[0][name] == values).all() for name, values in codes[1].items())


def initializers(path: Path, pattern: str) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if re.search(pattern, t.name)}


def external(tmp_path: Path, **entries: str) -> Path:
    """A model with one external weight [4, 64], whose reference is overridden by `entries`."""
    x, y = (onnx.helper.make_tensor_value_info(n, 1, ["b", d]) for n, d in (("x", 4), ("y", 64)))
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4, 64], data_location=onnx.TensorProto.EXTERNAL)
    info = {"location": "w.data", "offset": "0", "length": "1024", **entries}
    weight.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in info.items())
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="/fc/MatMul")
    graph = onnx.helper.make_graph([node], "g", [x], [y], [weight])
    (tmp_path / "w.data").write_bytes(np.ones((4, 64), np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return tmp_path / "m.onnx"


def test_external_data_is_found(tmp_path: Path) -> None:
    model, read = external(tmp_path), list[Path]()
    assert load(model, reads=read.extend).graph.tensors()["w"].shape == (4, 64)
    assert {*read} == {model, tmp_path / "w.data"}


def test_external_data_of_no_bytes(tmp_path: Path) -> None:
    weights = {"none": np.zeros((0, 64), np.float32), "w": np.eye(64, dtype=np.float32)}
    path = model_file(tmp_path / "m.onnx", "a = Concat <axis = 0> (none, x) y = MatMul(a, w)", weights)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert compiled_error(path, "a16w8", tmp_path / "out") < 1e-3


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "../w.data"}, "outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "nothing.data"}, "external data is missing"),
        ({"location": ""}, "external data is missing"),
        ({"offset": "-4"}, "does not fit"),
        ({"offset": "8"}, "does not fit"),
        ({"offset": "x"}, "no number"),
        ({"length": "4096"}, "does not fit"),
        ({"length": str(1 << 70)}, "does not fit"),
    ],
)
def test_hostile_external_data_is_refused(tmp_path: Path, entries: dict[str, str], says: str) -> None:
    path = external(tmp_path, **entries)
    with pytest.raises(UserError, match=says):
        load(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    path = external(inside)
    (tmp_path / "secret").write_bytes((inside / "w.data").read_bytes())
    (inside / "w.data").unlink()
    (inside / "w.data").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside the model's folder"):
        load(path)


@pytest.mark.parametrize("data", [b"", b"\x08", b"not protobuf at all", b"\xff" * 64])
def test_files_that_are_no_onnx_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(UserError):
        load(tmp_path / "m.onnx")


def test_paths_that_are_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"x")
    for path in (tmp_path / "m.bin", tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError):
            load(path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("y = MatMul(x)", r"MatMul \['y'\]: a node that its operator does not allow\n.*input size 1"),
        ("y = MatMul(x, a, a)", "input size 3"),
        ("y = Concat(x, x)", "Required attribute 'axis' is missing"),
        ('y = Gemm<transB = "a">(x, a)', "Mismatched attribute type"),
        ("y = Foo(x)", "No Op registered for Foo"),
        ("y = my.Foo(x)", "No opset import for domain 'my'"),
    ],
)
def test_a_node_that_no_runtime_takes_is_named(body: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        load(model_file(tmp_path / "m.onnx", body, {"a": A}))


def test_what_onnx_raises_over_a_graph_is_an_error_of_the_user(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", "y = MatMul(x, a)", {"a": A})
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = b"short"
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"m.onnx: reading the graph failed\n  found:    ValueError: ") as caught:
        load(path)
    assert isinstance(caught.value.__cause__, ValueError)
    model.graph.initializer[0].dims[0] = -1
    onnx.save(model, path)
    with pytest.raises(UserError, match="negative size"):
        load(path)


def test_an_input_without_a_rank_is_refused(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", "y = MatMul(x, a)", {"a": A})
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    with pytest.raises(UserError, match=r"the rank of an input or output is not known[^$]*found:\s+s"):
        load(path)


def unranked(folder: Path, op: str, domain: str = "") -> Path:
    """x [b, 64] -> `op` with a constant -> y, of which the file says nothing but its type."""
    weight = onnx.numpy_helper.from_array(np.ones((64, 32), np.float32), "w")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 64])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node(op, ["x", "w"], ["y"], name="fc", domain=domain)
    graph = onnx.helper.make_graph([node], "g", [x], [y], [weight])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("custom", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "m.onnx")
    return folder / "m.onnx"


def test_the_rank_of_an_output_is_inferred(tmp_path: Path) -> None:
    assert list(load(unranked(tmp_path, "MatMul")).graph.outputs[0].shape) == ["b", 32]


def test_an_output_of_unknown_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the rank of an input or output is not known[^$]*found:\s+y"):
        load(unranked(tmp_path, "Mystery", "custom"))


RANDOM = np.random.default_rng(2)
A, B = (RANDOM.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
X = RANDOM.standard_normal((5, 64)).astype(np.float32)


@pytest.mark.parametrize("quant", ["none", "a16w8"])
@pytest.mark.parametrize("stored", ["inline", "external"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_floats_are_widened(kind: str, stored: str, quant: str, tmp_path: Path) -> None:
    """Weights, small constants, attributes, casts and the interface; what float32 computes with the same weights."""
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    to, one = onnx.helper.np_dtype_to_tensor_dtype(dtype), np.array(1, dtype).view(np.uint16)  # the syntax wants bits
    body = f"""t = MatMul(x, a) n = Shape(t) z = ConstantOfShape <value = {kind}[1] {{{one}}}> (n) u = Add(t, z)
        v = Mul(u, half) w = Cast <to = 1> (v) r = Relu(w) s = Cast <to = {to}> (r) y = MatMul(s, b)"""
    a, b, half = A.astype(dtype), B.astype(dtype), np.array(0.5, dtype)
    path = model_file(tmp_path / "m.onnx", body, {"a": a, "b": b, "half": half}, kind=kind)
    if stored == "external":
        onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=1024)
    planned = planned_and_written(Request(path, ("x86", "sm89"), tmp_path / "out", quant=quant, builder="kit"))
    assert (planned.types["sm89"].name, planned.notes[0]) == (kind, f"{kind} inputs and outputs become float32")
    (got,) = session(tmp_path / "out/x86/model.onnx").run(None, {"x": X})
    want = np.maximum((X @ a.astype(np.float32) + 1) / 2, 0) @ b.astype(np.float32)
    assert relative(got, want) < (1e-6 if quant == "none" else 2e-2)


def test_an_artifact_is_read_back_as_it_is(tmp_path: Path) -> None:
    """With the 16 bits of an embedding table, and the QuantizeLinear of activations."""
    body = "i = ArgMax <axis = 1, keepdims = 0> (x) e = Gather(t, i) y = MatMul(e, a)"
    model = model_file(
        tmp_path / "m.onnx", body, {"t": A.astype(np.float16), "a": B.astype(np.float16)}, kind="float16"
    )
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="m.data", size_threshold=1024)
    (planned,) = planned_and_written(Request(model, ("x86",), tmp_path, quant="a8w8")).lowered.values()
    back = artifact_graph(tmp_path / "x86/model.onnx")
    assert {"Cast", "QuantizeLinear"} <= {node.op for node in back.nodes}
    types = [{n: t.dtype for n, t in g.tensors().items() if isinstance(t, gs.Constant)} for g in (back, planned)]
    assert types[0] == types[1]
    assert np.dtype(np.float16) in types[0].values()


@pytest.mark.parametrize("kind", ["double", "int64"])
def test_other_numbers_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    dtype = np.dtype({"double": np.float64}.get(kind, kind))
    path = model_file(tmp_path / "m.onnx", "y = MatMul(x, a)", {"a": (A * 9).astype(dtype)}, kind=kind)
    compile_model(Request(path, ("x86",), tmp_path / "out", quant="none"))
    feeds = {"x": (X * 9).astype(dtype)}
    want, got = (session(each).run(None, feeds)[0] for each in (path, tmp_path / "out/x86/model.onnx"))
    assert (got == want).all()
    with pytest.raises(UserError, match="no linear layer to quantize"):
        plan(Request(path, ("x86",), tmp_path / "out", quant="a16w8"))


@pytest.mark.parametrize("opset", [17, 21, 22, 24])
def test_operators_that_are_fused_exist_in_the_artifacts_opset(opset: int, tmp_path: Path) -> None:
    axes = "m = ReduceMean <axes = [-1]> (p)" if opset < 18 else "m = ReduceMean(p, last)"
    body = f"""p = Pow(x, two) {axes} e = Add(m, eps) s = Sqrt(e) r = Reciprocal(s) n = Mul(x, r) o = Mul(g, n)
        d = Div(o, root) f = Erf(d) h = Add(f, one) i = Mul(o, h) j = Mul(i, half) y = MatMul(j, a)"""
    scalars = {"two": 2, "eps": 1e-5, "root": 2**0.5, "one": 1, "half": 0.5}
    weights = {name: np.array(value, np.float32) for name, value in scalars.items()}
    weights |= {"g": np.full(64, 1.5, np.float32), "a": A} | ({"last": np.array([-1])} if opset > 17 else {})
    path = model_file(tmp_path / "m.onnx", body, weights, opset)
    assert compiled_error(path, "a16w8", tmp_path / "out") < 2e-2
    written = onnx.load(tmp_path / "out/x86/model.onnx", load_external_data=False)
    assert {"RMSNormalization", "Gelu"} <= {node.op_type for node in written.graph.node}


BRANCHES = """e = ReduceMax <keepdims = 0> (x) c = Greater(e, zero)
    t = If(c) <then_branch = one () => (float[b, 64] p) {{ {} p = MatMul(x, a) }},
               else_branch = two () => (float[b, 64] q) {{ q = MatMul(x, b) }}>
    u = MatMul(x, a) s = Add(t, u) y = MatMul(s, b)"""


@pytest.mark.parametrize("stored", ["inline", "external"])
@pytest.mark.parametrize("inner", [False, True])
def test_weights_of_branches_are_stored(inner: bool, stored: str, tmp_path: Path) -> None:
    """Those that a branch holds, and those that it takes from the graph around it."""
    body = BRANCHES.format("").replace("MatMul(x, b)", "MatMul(x, w)" if inner else "MatMul(x, b)")
    path = model_file(tmp_path / "m.onnx", body, {"a": A, "b": B, "zero": np.array(0, np.float32)})
    model = onnx.load(path)
    if inner:
        (branch,) = (a.g for n in model.graph.node for a in n.attribute if a.name == "else_branch")
        branch.initializer.append(onnx.numpy_helper.from_array(A + B, "w"))
    onnx.save(model, path, save_as_external_data=stored == "external", location="m.data", size_threshold=1024)
    for quant, bound in (("none", 1e-6), ("a16w8", 2e-2)):
        out = tmp_path / quant
        assert compiled_error(path, quant, out) < bound
        feeds = {"x": -np.abs(X)}  # the other branch
        want, got = (session(each).run(None, feeds)[0] for each in (path, out / "x86/model.onnx"))
        assert relative(got, want) < bound


LOOP = """n = Constant <value = int64 {3}> () t = Loop(n, , x) <body = one (int64 i, bool c, float[b, 64] p) =>
    (bool d, float[b, 64] q) { d = Identity(c) r = MatMul(p, a) s = Tanh(r) q = Add(s, x) }> y = MatMul(t, b)"""


@pytest.mark.parametrize("target", ["sm89", "sm70"])
@pytest.mark.parametrize("body", [BRANCHES.format(""), LOOP])
def test_branches_of_an_engine_compute_in_float32(body: str, target: str, tmp_path: Path) -> None:
    weights = {"a": A / 8, "b": B / 8, "zero": np.array(0, np.float32)}
    path = model_file(tmp_path / "m.onnx", body, weights)
    compile_model(Request(path, (target,), tmp_path, quant="a16w8", builder="kit"))
    lowered = session(tmp_path / target / "model.onnx", as_written=True)
    want, got = (each.run(None, {"x": X})[0] for each in (session(path), lowered))
    assert relative(got, want) < 2e-2


@pytest.mark.parametrize("taken", ["k", "b"], ids=["another branch", "the graph around"])
@pytest.mark.parametrize("rows", [1, 64], ids=["small", "large"])
def test_weights_of_branches_whose_names_are_taken(taken: str, rows: int, tmp_path: Path) -> None:
    """ONNX Runtime takes what is nearest."""
    op = "Mul" if rows == 1 else "MatMul"
    body = BRANCHES.format("").replace("MatMul(x, a) }", f"{op}(x, {taken}) }}")
    body = body.replace("MatMul(x, b) }", f"{op}(x, {taken}) }}")
    path = model_file(tmp_path / "m.onnx", body, {"a": A, "b": B, "zero": np.array(0, np.float32)})
    model = onnx.load(path)
    branches = [a.g for n in model.graph.node for a in n.attribute if a.name.endswith("branch")]
    for branch, values in zip(branches, (A - B, A + B), strict=True):
        branch.initializer.append(onnx.numpy_helper.from_array(values[:rows], taken))
    onnx.save(model, path)
    assert compiled_error(path, "none", tmp_path / "out") < 1e-6
    feeds = {"x": -np.abs(X)}  # the other branch
    want, got = (session(each).run(None, feeds)[0] for each in (path, tmp_path / "out/x86/model.onnx"))
    assert relative(got, want) < 1e-6


def test_constant_nodes_with_external_data(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", "y = MatMul(x, c)", {})
    model = onnx.load(path)
    value = onnx.numpy_helper.from_array(A, "c")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["c"], value=value))
    onnx.save(model, path, save_as_external_data=True, location="m.data", convert_attribute=True)
    assert compiled_error(path, "a16w8", tmp_path / "out") < 2e-2


@pytest.mark.parametrize("opset", [17, 21])
def test_weights_in_constant_nodes_and_functions_are_quantized(opset: int, tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", "t = my.linear(x, a) u = Mul(t, k) y = MatMul(u, c)", {"a": A}, opset)
    model = onnx.load(path)
    constants = {"c": {"value": onnx.numpy_helper.from_array(B)}, "k": {"value_float": 0.5}}
    for name, value in constants.items():
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], **value))
    opsets = [onnx.helper.make_opsetid("", opset)]
    product = onnx.helper.make_node("MatMul", ["p", "q"], ["o"])
    model.functions.append(onnx.helper.make_function("my", "linear", ["p", "q"], ["o"], [product], opsets))
    model.opset_import.append(onnx.helper.make_opsetid("my", 1))
    onnx.save(model, path)
    planned = plan(Request(path, ("x86",), tmp_path / "out", quant="a16w8"))
    assert len(planned.twins["x86"].quantized) == 2
    assert compiled_error(path, "a16w8", tmp_path / "out") < 2e-2


def test_a_function_that_calls_itself_is_refused(tmp_path: Path) -> None:
    head = '<ir_version: 10, opset_import: ["": 21, "my": 1]> g (float[b, 64] x) => (float[b, 64] y) { y = my.f(x) }'
    model = onnx.parser.parse_model(f'{head} <domain: "my", opset_import: ["my": 1]> f (a) => (o) {{ o = my.f(a) }}')
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UserError, match="cannot be brought to opset"):
        load(tmp_path / "m.onnx")


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    weights = {"q": np.ones((64, 64), np.int8), "s": np.array(0.1, np.float32)}
    path = model_file(tmp_path / "m.onnx", '["fc/dq"] w = DequantizeLinear(q, s) y = MatMul(x, w)', weights)
    with pytest.raises(UserError, match=r"quantized already[^$]*DequantizeLinear fc/dq"):
        load(path)


@pytest.mark.parametrize(
    ("body", "ignore", "says"),
    [
        ("y = Relu(x)", (), "no linear layer to quantize"),
        ("y = Relu(x)", ("foo",), "no linear layer to quantize"),
        ("y = MatMul(x, a)", ("*",), "no linear layer is left to quantize"),
        ("y = MatMul(x, a)", ("foo",), "matches no layer"),
    ],
)
def test_a_quantization_of_nothing_is_refused(body: str, ignore: tuple[str, ...], says: str, tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", body, {"a": A})
    with pytest.raises(UserError, match=says):
        plan(Request(path, ("x86",), tmp_path / "out", quant="a16w8", ignore=ignore))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_checkpoint_that_lies_beside_says_nothing(method: str, tmp_path: Path) -> None:
    """Neither that the layers are quantized, nor that nothing can read them."""
    path = model_file(tmp_path / "m.onnx", "y = MatMul(x, a)", {"a": A})
    config = {"quant_method": method, "bits": 8, "group_size": 64}
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert plan(Request(path, ("x86",), tmp_path / "out", quant="a16w8")).twins["x86"].quantized
    with pytest.raises(UserError, match="ignore does nothing without quantization"):
        plan(Request(path, ("x86",), tmp_path / "out", ignore=("a",)))


def test_a_length_without_sequences_is_refused(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m.onnx", "y = Relu(x)", {})
    with pytest.raises(UserError, match="max_length does nothing without a GPU target or a causal LM"):
        plan(Request(path, ("x86",), tmp_path / "out", quant="none", max_length=64))
    plan(Request(path, ("sm89",), tmp_path / "out", quant="none", max_length=64, builder="kit"))
