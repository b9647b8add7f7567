"""Every artifact runs once before it is published: what is wrong in a real way fails, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from instantrt.compiler import pipeline, plan
from instantrt.compiler.artifact.manifest import MANIFEST
from instantrt.compiler.check import check
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.llm import LLM
from instantrt.compiler.request import Request
from instantrt.compiler.smoke import memory, process
from instantrt.compiler.smoke.lockstep import first_not_finite, lockstep
from instantrt.compiler.smoke.process import Child, ModelOrder, standby, started
from instantrt.compiler.smoke.ran import Ran, SmokeError
from instantrt.compiler.smoke.steps import llm_steps
from instantrt.compiler.watch import Watch
from instantrt.passes.core import apart
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.evaluate_node import STREAMED
from instantrt.passes.core.lazy import BFLOAT16, small
from instantrt.passes.core.quant import scales_of
from instantrt.passes.core.rewrite import add
from instantrt.passes.ort import nbits
from instantrt.passes.ort.limbs import Limbs
from tests.commands import invoke
from tests.conftest import TINY, contents
from tests.graphs import model_file

F = TensorProto.FLOAT
Break = Callable[[gs.Graph], None]


class Seen(Watch):
    """What became of each artifact."""

    def __init__(self) -> None:
        self.all: list[Ran] = []

    def ran(self, ran: Ran) -> None:
        self.all.append(ran)


def ran(model: Path, out: Path, target: str = "x86", **fields: object) -> Ran:
    """Compiles, and says what the smoke run saw."""
    watch = Seen()
    compile_model(Request(model, (target,), out, **fields), watch=watch)  # type: ignore[arg-type]
    (one,) = watch.all
    return one


def refused(model: Path, out: Path, words: str, target: str = "x86", **fields: object) -> None:
    """Compiles; it fails with `words`, and leaves nothing."""
    with pytest.raises(SmokeError, match=words):
        ran(model, out, target, **fields)
    assert not out.exists()


def node(graph: gs.Graph, op: str, index: int = 0) -> gs.Node:
    return [each for each in graph.nodes if each.op == op][index]


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Break], None]:
    """Makes the lowering for CPUs wrong: what it is given changes every lowered graph."""
    right = pipeline.lower_onnxruntime

    def install(wrong: Break) -> None:
        def lower(*args: object) -> gs.Graph:
            graph = right(*args)  # type: ignore[arg-type]
            wrong(graph)
            return graph

        monkeypatch.setattr(pipeline, "lower_onnxruntime", lower)

    return install


@pytest.mark.parametrize(
    ("fields", "arithmetic"),
    [
        ({}, "float32"),
        ({"quant": "a16w8", "logits": "all", "max_length": 8}, "int8 per block"),  # no more than it takes is asked
        ({"quant": "a16w4", "group_size": 32, "cpu_preset": "fast"}, "int8 per block"),
        ({"quant": "a8w8", "portable": True, "lm_head": "float"}, "int8 per token"),
        ({"quant": "a16w8", "cpu_preset": "exact"}, "two limbs"),
        ({"quant": "a16w4", "kv_cache_type": "int8"}, "int8 per block"),  # whose last bits turn codes of the cache
    ],
    ids=str,
)
def test_what_is_right_runs(fields: dict[str, object], arithmetic: str, tmp_path: Path) -> None:
    found = ran(TINY, tmp_path / "out", **fields)
    assert found.bound.name == arithmetic
    assert found.distance.step  # something was compared
    assert found.distance.relative < found.bound.model / 2
    assert not found.notes


def forget_causality(graph: gs.Graph) -> None:
    """Every token sees every other one."""
    attention = node(graph, "Attention")
    mask = attention.inputs[3]
    everything = gs.Variable("mask/everything", mask.dtype, mask.shape)
    nothing = add(graph, "Not", [mask], "mask/hidden") if mask.dtype == np.bool_ else small("zero", 0, mask.dtype)
    add(graph, "Or" if mask.dtype == np.bool_ else "Mul", [mask, nothing], everything)
    for each in (n for n in graph.nodes if n.op == "Attention"):
        each.inputs[3] = everything
    graph.toposort()


def one_position_late(graph: gs.Graph) -> None:
    later = gs.Variable("position_ids/later", np.dtype(np.int64), ["batch", "sequence"])
    (ids,) = (t for t in graph.inputs if t.name == "position_ids")
    for each in list(ids.outputs):
        each.inputs = [later if t is ids else t for t in each.inputs]
    graph.nodes.insert(0, gs.Node("Add", "later", {}, [ids, small("one", 1, np.int64)], [later]))


def ends_early(graph: gs.Graph) -> None:
    """The cache's lengths are one too few for the second row of a batch, as if rows were padded otherwise."""
    attention = node(graph, "GroupQueryAttention")
    last = attention.inputs[5]
    shorter = add(graph, "Mul", [last, small("none", 0, np.int32)], "lengths/none")
    new = add(graph, "Add", [shorter, small("one", 1, np.int32)], "lengths/one")
    for each in (n for n in graph.nodes if n.op == "GroupQueryAttention"):
        each.inputs[5], each.inputs[16] = shorter, new
    graph.toposort()


def cache_of_another_layer(graph: gs.Graph) -> None:
    one, two = (next(t for t in graph.outputs if t.name == f"present.{i}.key") for i in (0, 1))
    one.name, two.name = two.name, one.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "fields", "words"),
    [
        (
            forget_causality,
            {"portable": True},
            r"prefill.*causality: the model's first token does not see.*layers\.0\.self_attn\.o_proj",
        ),
        (one_position_late, {"portable": True}, r"prefill.*; model\.layers\.0\.self_attn\.\w+: after"),
        (ends_early, {}, r"prefill.*; model\.layers\.0\.self_attn\.o_proj: after pass writing the artifact"),
        (cache_of_another_layer, {}, r"present\.\d\.key is off by"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_lowering_fails(
    wrong: Break, fields: dict[str, object], words: str, lowered: Callable[[Break], None], tmp_path: Path
) -> None:
    lowered(wrong)
    refused(TINY, tmp_path / "out", f"(?s){words}", **fields)


def off_by_two_percent(name: str, rows: slice) -> Break:
    """The scales of some rows of a linear layer, which the bound of a whole model's answers would let pass."""

    def wrong(graph: gs.Graph) -> None:
        scales = graph.tensors()[f"model.layers.1.{name}.scales"]
        scales.values = np.array(scales.values)
        scales.values[rows] *= np.float32(1.02)

    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "layer"),
    [
        ("self_attn.(q_proj+k_proj+v_proj)", slice(0, 256), "self_attn.q_proj"),
        ("self_attn.(q_proj+k_proj+v_proj)", slice(256, 320), "self_attn.k_proj"),
        ("mlp.down_proj", slice(None), "mlp.down_proj"),
    ],
    ids=["q", "k", "down"],
)
def test_a_wrong_layer_is_named(
    name: str, rows: slice, layer: str, lowered: Callable[[Break], None], tmp_path: Path
) -> None:
    lowered(off_by_two_percent(name, rows))
    refused(TINY, tmp_path / "out", rf"; model\.layers\.1\.{re.escape(layer)}: after pass writing", quant="a16w8")


@pytest.mark.slow
def test_a_wrong_scale_is_found_in_its_pass_and_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two percent off, in every block."""
    monkeypatch.setattr(nbits, "scales_of", lambda tile: (scales_of(tile) * np.float32(1.02)).astype(BFLOAT16))
    attention = r"model\.layers\.0\.self_attn"  # it reads q, k and v whole: its cache is the first that is seen
    words = rf"(?s)prefill.*; {attention}\.v_proj: after pass LowerToExactBlocks, node {attention}/.*present\.0\."
    refused(TINY, tmp_path / "out", words, quant="a16w4", group_size=32, cpu_preset="exact")


@pytest.mark.slow
def test_rows_padded_on_the_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last position instead of each row's last token: right for rows padded on the left alone."""
    right = pipeline.last_logits
    monkeypatch.setattr(pipeline, "last_logits", lambda graph, request, **_: right(graph, request, by_mask=False))
    refused(TINY, tmp_path / "out", "does not compute what the model does: padded on the right")


@pytest.mark.slow
def test_a_kit_is_evaluated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = ran(TINY, tmp_path / "right", "sm90", quant="a16w4", group_size=32)
    assert found.bound.name == "bfloat16"
    assert found.distance.relative > 0
    assert "no engine is built yet" in found.notes[0]
    with monkeypatch.context() as patch:  # a copy of the process that ends without a word
        patch.setattr(apart, "outcome", lambda work: os._exit(1))
        assert ran(TINY, tmp_path / "alone", "sm90", quant="a16w4", group_size=32).distance == found.distance
    right = pipeline.lower_tensorrt

    def wrong(*args: object) -> gs.Graph:
        graph = right(*args)  # type: ignore[arg-type]
        forget_causality(graph)
        return graph

    monkeypatch.setattr(pipeline, "lower_tensorrt", wrong)
    refused(TINY, tmp_path / "wrong", "for sm90 does not compute", target="sm90")


def file_of(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[object]]],
    outputs: dict[str, tuple[int, list[object]]],
    opset: int = 17,
    **weights: np.ndarray,
) -> Path:
    """An .onnx file."""
    sides = [[helper.make_tensor_value_info(n, *about) for n, about in side.items()] for side in (inputs, outputs)]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", *sides, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


W = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


def relu(folder: Path) -> Path:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    return file_of(folder, nodes, {"x": (F, ["b", 64])}, {"y": (F, ["b", 64])}, w=W)


def test_a_node_without_a_kernel(lowered: Callable[[Break], None], tmp_path: Path) -> None:
    """A valid graph; ONNX Runtime has no kernel for this operator at the opset of artifacts."""
    lowered(lambda graph: setattr(node(graph, "Relu"), "op", "RandomNormalLike"))
    refused(relu(tmp_path), tmp_path / "out", "(?s)cannot be loaded.*RandomNormalLike")


def test_what_draws_random_numbers_is_not_compared(tmp_path: Path) -> None:
    nodes = [helper.make_node("RandomNormalLike", ["x"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    found = ran(file_of(tmp_path, nodes, {"x": (F, [4])}, {"y": (F, [4])}), tmp_path / "out")
    assert found.notes == ("not compared: RandomNormalLike makes every run another one",)


@pytest.mark.parametrize("target", ["x86", "sm90"])
def test_inputs_that_fit_nowhere_are_not_made_up(target: str, tmp_path: Path) -> None:
    about = {"x": (F, ["b", 1 << 50])}, {"y": (F, ["b", 1 << 50])}
    found = ran(file_of(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], *about), tmp_path / "out", target)
    assert "not compared: its inputs are too large to make up" in found.notes


def test_an_artifact_that_this_machine_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    path = model_file(tmp_path / "m.onnx", "y = MatMul(x, w)", {"w": W})
    with pytest.raises(UserError, match=r"(?s)the artifact for x86 cannot run once.*0.0 GB available.*--no-smoke"):
        compile_model(Request(path, ("x86",), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    compile_model(Request(path, ("x86",), tmp_path / "out", smoke=False))


@pytest.mark.parametrize("quant", [None, "a16w8"])
@pytest.mark.parametrize("target", ["x86", "sm90"])
def test_a_converter_that_changes_the_graph(
    quant: str | None, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The twin is what the frontend made of the file: only the file itself shows that it is not the same."""
    model = relu(tmp_path)
    assert ran(model, tmp_path / "right", target, quant=quant).distance.step
    load = plan.load

    def wrong(*args: object, **how: object) -> FloatModel:
        found = load(*args, **how)  # type: ignore[arg-type]
        node(found.graph, "Relu").op = "Abs"
        return found

    monkeypatch.setattr(plan, "load", wrong)
    refused(model, tmp_path / "wrong", "does not compute what the .onnx file does", quant=quant, target=target)


@pytest.mark.parametrize(
    ("nodes", "inputs", "outputs", "weights"),
    [
        # ids that fit a table of two rows are found, and of one
        ([("Gather", "t ids", "y")], {"ids": (7, ["b", "s"])}, {"y": (F, ["b", "s", 64])}, {"t": W[:2]}),
        ([("Gather", "t ids", "y")], {"ids": (7, ["b", "s"])}, {"y": (F, ["b", "s", 64])}, {"t": W[:1]}),
        ([("Not", "x", "y")], {"x": (TensorProto.BOOL, ["b"])}, {"y": (TensorProto.BOOL, ["b"])}, {}),
        ([("Identity", "x", "y")], {"x": (TensorProto.STRING, ["b"])}, {"y": (TensorProto.STRING, ["b"])}, {}),
        ([("MatMul", "x w", "y")], {"x": (10, ["b", 64])}, {"y": (10, ["b", 64])}, {"w": W.astype(np.float16)}),
        ([("Relu", "x", "r"), ("NonZero", "r", "y")], {"x": (F, ["b", 6])}, {"y": (7, [2, "n"])}, {}),
        ([("Relu", "x", "y")], {"x": (F, [0, 6])}, {"y": (F, [0, 6])}, {}),
        ([("Log", "x", "y")], {"x": (F, [4, 6])}, {"y": (F, [4, 6])}, {}),  # NaN in the file, too
        ([("Add", "a b", "y")], {"a": (F, ["n", "m"]), "b": (F, ["m", "m"])}, {"y": (F, ["k", "m"])}, {}),
    ],
    ids=["ids", "one id", "bool", "string", "half", "dynamic", "empty", "log", "names"],
)
def test_any_model_runs(
    nodes: list[tuple[str, str, str]],
    inputs: dict[str, tuple[int, list[object]]],
    outputs: dict[str, tuple[int, list[object]]],
    weights: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    made = [helper.make_node(op, read.split(), [written]) for op, read, written in nodes]
    found = ran(file_of(tmp_path, made, inputs, outputs, **weights), tmp_path / "out")
    assert found.distance.step
    assert not found.notes


def test_a_model_that_is_not_finite(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    model = file_of(tmp_path, nodes, {"x": (F, ["b", 64])}, {"y": (F, ["b", 64])}, w=np.full_like(W, np.nan))
    refused(model, tmp_path / "out", "(?s)the model itself gives values that are not finite.*first tensor .* is h")


def test_zeros_are_no_false_alarm(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = file_of(tmp_path, nodes, {"x": (F, ["b", 64])}, {"y": (F, ["b", 64])}, w=np.zeros_like(W))
    for quant in (None, "a16w8", "a8w8"):
        assert ran(model, tmp_path / f"{quant}", quant=quant).distance.largest == 0


def test_rounding_that_the_model_amplifies_is_said(tmp_path: Path) -> None:
    """The difference of two nearly equal products is nothing but rounding, in every form of the model."""
    nodes = [
        helper.make_node("Add", ["x", "c"], ["nearly"]),
        helper.make_node("MatMul", ["x", "w"], ["wx"]),
        helper.make_node("MatMul", ["nearly", "v"], ["vx"]),
        helper.make_node("Sub", ["wx", "vx"], ["y"]),
    ]
    about = {"x": (F, ["b", 64])}, {"y": (F, ["b", 64])}
    model = file_of(tmp_path, nodes, *about, w=W, v=W, c=np.float32([5e-3]))
    found = ran(model, tmp_path / "out", quant="a16w8")
    assert found.distance.relative > found.bound.model
    assert "the model amplifies rounding" in found.notes[0]


def test_an_order_that_float16_changes_is_no_wrong_layer(tmp_path: Path) -> None:
    """Places of values that are nearly equal: integers, which are equal or not."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("TopK", ["h", "k"], ["v", "y"])]
    about = {"x": (F, [64, 64])}, {"y": (TensorProto.INT64, [64, 64])}
    found = ran(file_of(tmp_path, nodes, *about, w=W, k=np.array([64])), tmp_path / "out", "sm89")
    assert re.search("values that are others. .*the model amplifies rounding", found.notes[-1])


def test_minus_infinity_is_the_lowest_number_of_float16(tmp_path: Path) -> None:
    weights = {"w": W, "zero": np.float32(0), "low": np.float32(-np.inf)}
    path = model_file(tmp_path / "m.onnx", "m = MatMul(x, w) b = Greater(m, zero) y = Where(b, m, low)", weights)
    found = ran(path, tmp_path / "out", "sm89")
    assert found.distance.within(found.bound.model)


def test_a_model_that_float16_is_too_coarse_for(tmp_path: Path) -> None:
    body, weights = "m = MatMul(x, w) a = Add(m, k) y = Sub(a, k)", {"w": W, "k": np.float32(1e4)}
    path = model_file(tmp_path / "m.onnx", body, weights)
    refused(path, tmp_path / "out", "(?s)float16 is too coarse for this model.*compile it for a CPU", "sm89")


def test_infinities_of_both_are_no_wrong_layer(tmp_path: Path) -> None:
    """What else is beyond its bound there is rounding, amplified."""
    body, weights = "m = MatMul(x, w) n = Mul(m, k) y = Exp(n)", {"w": W, "k": np.float32(100)}
    path = model_file(tmp_path / "m.onnx", body, weights)
    assert ran(path, tmp_path / "out", quant="a16w8").distance.step


def sized_by_its_last_cache(graph: gs.Graph) -> gs.Graph:
    """A graph whose first nodes read the sizes of a cache that its last nodes make, as exported masks do."""
    graph = graph.copy()
    cache = [t for t in graph.inputs if t.name.startswith("past_key_values.")][-1]
    (ids,) = (t for t in graph.inputs if t.name == "input_ids")
    readers = list(ids.outputs)
    length = add(graph, "ReduceMax", [add(graph, "Shape", [cache], "cache/shape")], "cache/length", keepdims=0)
    same = add(graph, "Add", [ids, add(graph, "Mul", [length, small("none", 0, np.int64)], "cache/none")], "ids/same")
    for each in readers:
        each.inputs = [same if t is ids else t for t in each.inputs]
    graph.nodes[:] = [*graph.nodes[-4:], *graph.nodes[:-4]]
    return graph


def test_lockstep_is_one_run_after_another(tiny_float: FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step, those with a cache too, as an evaluation of its own gives it; and a weight streams once for all."""
    streamed: list[str] = []

    def counted(node: gs.Node, runs: Any, graph: gs.Graph) -> Any:
        found = matmul(node, runs, graph)
        streamed.extend([node.name] if found is not None else [])
        return found

    matmul = STREAMED["MatMul"]
    monkeypatch.setitem(STREAMED, "MatMul", counted)
    llm, graph = tiny_float.llm, sized_by_its_last_cache(tiny_float.graph)
    assert llm is not None
    steps = llm_steps(graph, llm, right=True)
    together = lockstep(graph, steps)
    assert len(streamed) == len(set(streamed)) > 7
    assert not first_not_finite(graph, steps)
    alone: dict[str, dict[str, np.ndarray]] = {}
    for step in steps:
        past = {n.replace("present.", "past_key_values."): v for n, v in alone.get(step.after, {}).items()}
        past.pop("logits", None)
        names = [t.name for t in graph.outputs]
        run = Evaluation(graph, {**step.feeds, **past}, keep=names)
        alone[step.name] = {name: run.peek(name) for name in names}
        for name, value in alone[step.name].items():
            np.testing.assert_allclose(together[step.name][name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def test_padding_of_another_form_is_not_gone_on_with(tiny_float: FloatModel) -> None:
    """It may be what was in memory: the form that left it there reads it no more, a product by zero would."""
    llm, graph = tiny_float.llm, tiny_float.graph
    assert llm is not None
    name = next(node.inputs[0].name for node in graph.nodes if node.name == "model.layers.0.self_attn.o_proj")
    steps = [step for step in llm_steps(graph, llm, right=True) if step.name == "padded on the right"]
    plain = lockstep(graph, steps)["padded on the right"]
    tokens = steps[0].tokens
    assert tokens is not None
    assert not tokens.all()
    (value,) = Evaluation(graph, steps[0].feeds, keep=[name]).peek(name)[None]
    for wrong in (np.nan, 1e30):
        given = value.copy()
        given[~tokens] = wrong
        found = lockstep(graph, steps, given={"padded on the right": {name: given}})["padded on the right"]
        np.testing.assert_allclose(found["logits"][tokens], plain["logits"][tokens], rtol=1e-4, atol=1e-4)
    shifted = lockstep(graph, steps, given={"padded on the right": {name: value + 1}})["padded on the right"]
    assert np.abs(shifted["logits"][tokens] - plain["logits"][tokens]).max() > 1e-2


def test_how_a_process_ends(tmp_path: Path) -> None:
    model = file_of(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], {"x": (F, [2])}, {"y": (F, [2])})
    order, feeds = ModelOrder(str(model), (("run", ""),)), {"run|x": np.array([-1, 1], np.float32)}
    with started([order, replace(order, model=str(tmp_path / "none.onnx")), order], feeds) as process:
        first, second, third = process.outcomes()
    assert first.answers["run"]["y"].tolist() == third.answers["run"]["y"].tolist() == [0, 1]
    assert first.peak_kb > 1000
    assert (second.during, "none.onnx" in second.failed) == ("load", True)
    with started([order], feeds) as process:
        os.kill(process.child.pid, signal.SIGKILL)
        assert process.outcomes()[0].failed.startswith(
            "its process was ended by SIGKILL (the machine ran out of memory"
        )
    with started([order], feeds) as process:
        process.child.send_signal(signal.SIGSTOP)
        late = replace(process, deadline=time.monotonic())
        assert re.match(r"it did not finish within \d+ s", late.outcomes()[0].failed)
    assert process.child.poll() is not None


def test_a_process_waits_while_artifacts_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Child] = []
    monkeypatch.setattr(process, "begun", lambda: begun.append(BEGUN()) or begun[-1])
    with standby(needed=False):
        assert not begun
    with standby(needed=True):
        assert begun[0].poll() is None
    assert begun[0].returncode == -signal.SIGKILL  # it was not needed after all
    with standby(needed=True) as take:
        taken = take()
        assert taken is begun[1]
        with taken:
            assert taken.communicate() == ("", "")  # whoever began it is gone
        assert taken.returncode == 0


BEGUN = process.begun


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each target; FAILED leaves what was there before as it was; --no-smoke changes no byte."""
    model = file_of(
        tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (F, ["b", 64])}, {"y": (F, ["b", 64])}, w=W
    )
    words = ("compile", model, "--target", "x86", "--target", "sm90", "-o", tmp_path / "out")
    done = invoke(*words)
    assert re.search(
        r"x86: ran; (no difference from the twin|relative error to the twin .*, bound 1e-04 \(float32\))",
        done.output,
    )
    assert re.search(r"sm90: ran; .*\(float16\)\n +the lowered graph ran", done.output)
    assert done.output.splitlines()[-1].startswith("PASSED")
    before = contents(tmp_path / "out")
    invoke(*words, "--no-smoke")
    assert contents(tmp_path / "out") == before
    assert "smoke" not in json.loads((tmp_path / "out" / MANIFEST).read_text())["artifacts"][0]["source"]["request"]
    monkeypatch.setattr(Limbs, "weight", lambda self, codes: (codes ^ 0x81).view(np.int8))  # the last bit, too
    failed = invoke(*words, "--quant", "a16w8", "--cpu-preset", "exact")
    assert isinstance(failed.exception, SmokeError)
    assert contents(tmp_path / "out") == before


def test_check_runs_what_it_finds(tiny_compiled: Path) -> None:
    (line,) = check(tiny_compiled)
    assert re.search(r"a model for ONNX Runtime \(\d+ nodes\); ONNX Runtime [\d.]+ ran it", line)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("llm", {}, "llm is {}, not layers, kv_heads"),
        ("llm", {"layers": "4", "kv_heads": 2, "head_dim": 8, "vocab": 9, "max_length": 0}, "llm is .*, not layers"),
        ("path", 7, "path is 7, not a path"),
        ("path", "x86/\0", "path is .*, not a path"),
        ("path", "x86/\ud800", "path is .*, not a path"),
        ("inputs", [{"name": 3, "dtype": "float32", "shape": []}], "inputs is .*, not tensors"),
        ("kind", "wheel", "kind is 'wheel', not onnx, engine or kit"),
        ("kind", [], r"kind is \[\], not onnx"),
        ("kind", "engine", "without its engine's builder"),
        ("inputs", [{"name": "x", "dtype": "float32", "shape": 3}], "inputs is .*, not tensors"),
        ("digests", ["a"], "digests is .*, not files"),
        ("plugins", "x", "plugins is 'x', not names of files"),
        ("engine", {"builder": "tensorrt"}, "engine is .*, not builder, version"),
        ("engine", {"builder": "x", "version": "1", "sm": 89, "options": {}}, "engine is .*, not builder, version"),
        ("target", None, "target is None, not a name"),
        ("limits", 3, "limits is 3, not an object"),
        ("limits", {"cache": "shared", "max_length": "a"}, "limits is .*, not an object of counts"),
        ("limits", {"cache": []}, "limits is .*, not an object of counts"),
        ("limits", {}, "without its kind of cache"),
    ],
)
def test_a_hostile_manifest(field: str, value: object, words: str, tiny_compiled: Path, tmp_path: Path) -> None:
    body = json.loads((tiny_compiled / MANIFEST).read_text())
    body["artifacts"][0][field] = value
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(UserError, match=words):
        list(check(tmp_path))


@pytest.mark.parametrize("limits", [{"cache": "shared"}, {"cache": "shared", "max_batch": 0}])
def test_an_engine_without_its_limits_is_no_manifest_of_ours(
    limits: dict[str, Any], tiny_compiled: Path, tmp_path: Path
) -> None:
    body = json.loads((tiny_compiled / MANIFEST).read_text())
    engine = {"builder": "tensorrt_rtx", "version": "1", "sm": 89, "options": {}}
    body["artifacts"][0] |= {"kind": "engine", "engine": engine, "limits": limits}
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(UserError, match="not a manifest of ours"):
        LLM(tmp_path)


@pytest.mark.parametrize("artifacts", [[], [3], {}, None, [{}], "x"])
def test_a_manifest_of_nothing(artifacts: object, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 2, "artifacts": artifacts}))
    with pytest.raises(UserError, match="manifest"):
        list(check(tmp_path))
