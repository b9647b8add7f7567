"""The contract of a pass: what it declares is checked, what it did is logged, what it leaves can be read as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.dump import Dump, text_of
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import View
from instantrt.passes.core.linear import weight_constant
from instantrt.passes.core.rewrite import PassLog, Reject, Rewrite, add, run, take_over
from instantrt.passes.float.fuse_gelu import FuseGelu
from instantrt.passes.float.normalize_linears import NormalizeMatMul
from instantrt.passes.qdq.fold_order import FoldOrder
from tests.graphs import FLOAT32


class Negate(Rewrite[gs.Node]):
    """Abs(x) -> Neg(x); leaves Relu and says why."""

    def match(self, node: gs.Node) -> gs.Node | Reject | None:
        return Reject("a Relu") if node.op == "Relu" else node if node.op == "Abs" else None

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        name, x = match.name, match.inputs[0]
        add(graph, "Neg", [x], take_over(match), name=name)


class Forget(Negate):
    """Takes an output, and makes none."""

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:  # noqa: ARG002
        take_over(match)


class Unread:
    """A source that nobody may read."""

    def tiles(self) -> None:
        raise AssertionError("a weight was read")


def chain(*ops: str) -> gs.Graph:
    """x -> ops -> y."""
    x = tensor = gs.Variable("x", FLOAT32, ["n"])
    graph = gs.Graph(inputs=[x], opset=23, name="chain")
    for i, op in enumerate(ops):
        tensor = add(graph, op, [tensor], gs.Variable(f"{op}{i}", FLOAT32, ["n"]))
    graph.outputs = [tensor]
    return graph


def products(*values: float) -> gs.Graph:
    """x -> a product with a constant matrix for each of `values`, equal ones the same -> y; all in one module."""
    x = tensor = gs.Variable("x", FLOAT32, ["n", 4])
    graph = gs.Graph(inputs=[x], opset=23)
    weights = {value: gs.Constant(f"w{value}", np.full((4, 4), value, FLOAT32)) for value in values}
    for i, value in enumerate(values):
        tensor = add(
            graph, "MatMul", [tensor, weights[value]], gs.Variable(f"y{i}", FLOAT32, ["n", 4]), name=f"mlp/{i}"
        )
    graph.outputs = [tensor]
    return graph


def test_two_graphs_may_be_in_one_pass_at_once() -> None:
    """A model's passes are shared by all that is compiled in a process."""
    alone, first, second = products(1, 2, 1), products(1, 2, 1), products(3, 3, 3)
    run(alone, [NormalizeMatMul()], PassLog())
    shared = NormalizeMatMul()
    for _ in zip(shared.apply(first), shared.apply(second), strict=True):
        pass
    assert text_of(first) == text_of(alone)


def test_the_log_tells_the_pass_the_node_and_the_reason() -> None:
    log = PassLog(target="x86")
    run(chain("Abs", "Relu"), [Negate()], log)
    assert [(type(e.by), e.node, e.done, e.reason, e.target) for e in log.entries] == [
        (Negate, "Abs0", "", "", "x86"),
        (Negate, "Relu1", "", "a Relu", "x86"),
    ]
    assert [e.node for e in log.applied(Negate)] == ["Abs0"]
    assert log.applied(FuseGelu) == []


def test_what_a_pass_requires_is_checked_before_it() -> None:
    graph = chain("Abs", "QuantizeLinear")
    with pytest.raises(AssertionError, match=r"FoldOrder requires activations_are_float: node QuantizeLinear1"):
        run(graph, [FoldOrder(frozenset())], PassLog())


def test_what_a_pass_ensures_is_checked_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_neg(node: gs.Node) -> str | None:
        return "negative" if node.op == "Neg" else None

    monkeypatch.setattr(Negate, "ensures", (no_neg,))
    with pytest.raises(AssertionError, match=r"Negate ensures no_neg: node Abs0 \(Neg\): negative"):
        run(chain("Abs"), [Negate()], PassLog())


def test_a_pass_that_leaves_a_reader_without_its_input_is_told() -> None:
    with pytest.raises(AssertionError, match=r"every_input_is_made_once: .* 0 nodes make its input Abs0"):
        run(chain("Abs", "Relu"), [Forget()], PassLog())


def test_a_graph_is_written_after_each_pass_that_changed_it(tmp_path: Path) -> None:
    log, graph = Dump(folder=tmp_path / "dump"), chain("Abs", "Relu", "Abs")
    run(graph, [FuseGelu(), Negate()], log)
    log.target = "x86"
    run(chain("Abs"), [Negate(), FuseGelu()], log)
    assert (tmp_path / "dump" / "passes.txt").read_text().splitlines() == [
        "00-fuse_gelu: unchanged",
        "01-negate: 2 rewritten, 1 rejected",
        "x86/02-negate: 1 rewritten",
        "x86/03-fuse_gelu: unchanged",
    ]
    written = {str(p.relative_to(tmp_path / "dump")) for p in tmp_path.rglob("*.txt")}
    assert written == {"passes.txt", "01-negate.txt", "x86/02-negate.txt"}
    assert (tmp_path / "dump" / "01-negate.txt").read_text() == text_of(graph)
    assert [node.op_type for node in onnx.parser.parse_graph(text_of(graph)).node] == ["Neg", "Relu", "Neg"]


def test_an_older_dump_is_not_mixed_with_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "old.txt").touch()
    with pytest.raises(UserError, match="new folder"):
        Dump(folder=tmp_path)


def test_text_names_weights_and_reads_none() -> None:
    graph = chain("Abs")
    view = View(Unread(), (2, 2), np.float32)  # type: ignore[arg-type]
    add(graph, "Gather", [gs.Constant("embed", view), graph.outputs[0]], "rows")
    weight = weight_constant("fc", Unread(), (16, 64))  # type: ignore[arg-type]
    add(graph, "MatMul", [graph.nodes[-1].outputs[0], weight], "y")
    text = text_of(graph)
    assert "float[2,2] embed" in text
    assert 'float[64,16] "fc.weight_kn"' in text
    assert text_of(graph) == text
