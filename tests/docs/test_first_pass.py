"""The walk of docs/extending/first-pass.md: the pass that it writes does what the text that it writes says."""

from __future__ import annotations

import re
from typing import Any

import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt.compiler import pipeline
from instantrt.passes.core.dump import text_of
from instantrt.passes.core.rewrite import Pass, PassLog, run
from tests.conftest import ROOT

WALK = (ROOT / "docs/extending/first-pass.md").read_text("utf-8")
BLOCKS = [block for _, block in re.findall(r"^```(\w*)\n(.*?)^```", WALK, re.MULTILINE | re.DOTALL)]


def block(start: str) -> str:
    """The one code block that begins like this."""
    (found,) = (each for each in BLOCKS if each.startswith(start))
    return found


@pytest.mark.parametrize("case", [0, 1])
def test_the_pass_does_what_its_text_says(case: int) -> None:
    names: dict[str, Any] = {}
    exec(block('"""A Transpose'), names)
    head, *parts = block("the_pass = ").split("\n# ")
    exec(head, names)
    assert isinstance(names["the_pass"], Pass)
    (_, before), (kind, expected) = (part.split("\n", 1) for part in parts[2 * case : 2 * case + 2])
    model = onnx.helper.make_model(onnx.parser.parse_graph(before), opset_imports=[onnx.helper.make_opsetid("", 23)])
    graph, log = gs.import_onnx(model), PassLog()
    run(graph, [names["the_pass"]], log)
    if kind == "rejected":
        assert [entry.reason for entry in log.entries] == [expected.strip()]
    else:
        assert kind == "after"
        assert text_of(graph).strip() == expected.strip()


def test_its_place_is_there() -> None:
    line = block("FLOAT: ").splitlines()[0]
    assert line in (ROOT / "compiler/pipeline.py").read_text("utf-8")
    assert pipeline.FLOAT
