"""What is done with a graph grows as the graph does: each further layer costs what the one before did."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx.numpy_helper import from_array

from instantrt.compiler.plan import plan
from instantrt.compiler.request import Request

WIDTH, HEADS = 32, 4
DEAREST = 500_000  # steps for a layer of 44 nodes and two targets; it takes 330,000 where tokens are int8
INTERFACE = "int64[batch,sequence] input_ids, int64[batch,total] attention_mask"
CACHE = f'float[batch,{HEADS},%s,{WIDTH // HEADS}] "%s.%d.%s"'
MASK = """
   total = Shape <start: int = 1, end: int = 2> (attention_mask)
   new = Shape <start: int = 1, end: int = 2> (input_ids)
   end = Squeeze (total)
   count = Squeeze (new)
   columns = Range (zero, end, one)
   rows = Range (zero, count, one)
   past = Sub (end, count)
   places = Add (rows, past)
   keys = Unsqueeze (columns, as_keys)
   queries = Unsqueeze (places, as_queries)
   hidden = Greater (keys, queries)
   wide = Unsqueeze (attention_mask, as_rows)
   padding = Equal (wide, zero)
   unseen = Or (hidden, padding)
   mask = Where (unseen, lowest, none)
   h0 = Gather (table, input_ids)
"""
NORM = """
   {y}_square = Pow ({x}, two)
   {y}_mean = ReduceMean <keepdims: int = 1> ({y}_square, last)
   {y}_raised = Add ({y}_mean, epsilon)
   {y}_root = Sqrt ({y}_raised)
   {y}_factor = Reciprocal ({y}_root)
   {y}_unit = Mul ({x}, {y}_factor)
   {y} = Mul (gain, {y}_unit)
"""
LINEAR = """
   {y}_turned = Transpose <perm: ints = [1, 0]> ({y}_weight)
   {y} = MatMul ({x}, {y}_turned)
"""
SPLIT = """
   {x}_split = Reshape ({x}, apart)
   {x}_heads = Transpose <perm: ints = [0, 2, 1, 3]> ({x}_split)
"""
ATTENTION = """
   "present.{i}.key" = Concat <axis: int = 2> ("past_key_values.{i}.key", k{i}_heads)
   "present.{i}.value" = Concat <axis: int = 2> ("past_key_values.{i}.value", v{i}_heads)
   y{i} = Attention (q{i}_heads, "present.{i}.key", "present.{i}.value", mask)
   y{i}_turned = Transpose <perm: ints = [0, 2, 1, 3]> (y{i})
   y{i}_rows = Reshape (y{i}_turned, joined)
"""
GATED = """
   open{i} = Sigmoid (gate{i})
   silu{i} = Mul (gate{i}, open{i})
   inner{i} = Mul (silu{i}, up{i})
"""
SMALL = {
    "zero": np.int64(0),
    "one": np.int64(1),
    "two": np.float32(2),
    "none": np.float32(0),
    "lowest": np.float32(-1e5),
    "epsilon": np.float32(1e-6),
    "last": np.array([-1]),
    "as_keys": np.array([0, 1, 2]),
    "as_queries": np.array([0, 1, 3]),
    "as_rows": np.array([1, 2]),
    "apart": np.array([0, 0, HEADS, WIDTH // HEADS]),
    "joined": np.array([0, 0, WIDTH]),
    "gain": np.ones(WIDTH, np.float32),
    "table": np.ones((64, WIDTH), np.float32),
}


def layer(i: int) -> str:
    """h{i} -> h{i + 1}."""
    qkv = "".join(LINEAR.format(x=f"n{i}", y=f"{p}{i}") + SPLIT.format(x=f"{p}{i}") for p in "qkv")
    attended = qkv + ATTENTION.format(i=i) + LINEAR.format(x=f"y{i}_rows", y=f"o{i}") + f"a{i} = Add (h{i}, o{i})"
    mlp = "".join(LINEAR.format(x=f"m{i}", y=f"{p}{i}") for p in ("gate", "up")) + GATED.format(i=i)
    down = LINEAR.format(x=f"inner{i}", y=f"down{i}") + f"h{i + 1} = Add (a{i}, down{i})"
    return NORM.format(x=f"h{i}", y=f"n{i}") + attended + NORM.format(x=f"a{i}", y=f"m{i}") + mlp + down


def decoder(layers: int, path: Path) -> Path:
    """A causal LM as an exporter leaves it, with every weight of its own."""
    sides = [
        ", ".join(CACHE % (length, name, i, part) for i in range(layers) for part in ("key", "value"))
        for length, name in (("past", "past_key_values"), ("total", "present"))
    ]
    body = MASK + "".join(map(layer, range(layers))) + LINEAR.format(x=f"h{layers}", y="logits")
    text = f"graph ({INTERFACE}, {sides[0]}) => (float[batch,sequence,64] logits, {sides[1]}) {{ {body} }}"
    graph = onnx.parser.parse_graph(text)
    values: dict[str, Any] = dict(SMALL)
    for node in graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
        for name in (name for name in node.input if name.endswith("_weight")):
            values[name] = np.full((64 if node.output[0] == "logits_turned" else WIDTH, WIDTH), len(values), np.float32)
    graph.initializer.extend(from_array(np.asarray(value), name) for name, value in values.items())
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11), path)
    return path


def steps(action: Callable[[], object]) -> int:
    """Lines of Python that it runs, with each turn of a loop: the same on every machine."""
    count = 0

    def step(*_: object) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("quant", ["a16w8", "a8w8"])
def test_each_layer_costs_what_the_one_before_did(quant: str, tmp_path: Path) -> None:
    def work(layers: int) -> int:
        model = decoder(layers, tmp_path / f"{layers}.onnx")
        request = Request(model, ("x86", "sm89"), tmp_path / "out", quant=quant, builder="kit")
        return steps(lambda: plan(request))

    work(1)  # what is asked once is known by now
    few, some, many = work(3), work(6), work(12)
    assert many - some == pytest.approx(2 * (some - few), rel=0.003)
    assert (some - few) / 3 < DEAREST
