"""What each pass does, as text: `text/NAME.txt` shows graphs before and after it, and why it leaves others alone.

The first lines of such a file are Python: the pass and, as `weights`, what the quantized weights have in common.
Graphs are in ONNX's syntax. What is declared, but neither given nor made by a node, is a weight: a reference that no
pass reads.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from instantrt import passes
from instantrt.passes.core.dump import file_name, text_of
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import FileTensor, View
from instantrt.passes.core.linear import SUFFIX, weight_constant
from instantrt.passes.core.quant import InstantQuant, Order, QuantTensor
from instantrt.passes.core.rewrite import Pass, PassLog, Reject, run
from instantrt.passes.ort.cpu_gemm import Strips
from instantrt.passes.ort.limbs import ONE_LIMB_UNSIGNED, TWO_LIMBS
from instantrt.passes.tensorrt.packed import Fragments
from instantrt.plugins.cpu.op import CODES, GEMM
from instantrt.plugins.weight_only_gemm.op import OP

TEXT = Path(__file__).parent / "text"
FLOAT16 = np.dtype(np.float16)


def every_pass() -> Iterator[type[Pass]]:
    """The passes of the product that can be run."""
    for module in pkgutil.walk_packages(passes.__path__, passes.__name__ + "."):
        members = vars(importlib.import_module(module.name)).values()
        yield from (
            c
            for c in members
            if inspect.isclass(c) and issubclass(c, Pass) and not inspect.isabstract(c) and c.__module__ == module.name
        )


PASSES = {file_name(each): each for each in every_pass()}


NAMES: dict[str, Any] = {each.__name__: each for each in (*PASSES.values(), Order, Reject, np.dtype)}
NAMES |= {"ONE_LIMB_UNSIGNED": ONE_LIMB_UNSIGNED, "TWO_LIMBS": TWO_LIMBS, "array": np.array}


def stored(name: str, *shape: int) -> FileTensor:
    """A tensor in a file that is not there: to read it is an error."""
    return FileTensor(Path("no such file"), 0, shape, FLOAT16, name)


def quant(path: str, n: int, k: int, bits: int, group_size: int = -1, **others: Any) -> QuantTensor:
    """How the weight [N, K] at `path` is quantized."""
    group, symmetric = k if group_size == -1 else group_size, others.pop("symmetric", False)
    source = InstantQuant(path, stored(path, n, k), bits, group, symmetric, FLOAT16)
    return QuantTensor(path, source, (n, k), bits, group, symmetric, FLOAT16, **others)


NAMES["quant"] = quant


def quant_in_strips(node: gs.Node) -> QuantTensor:
    """How the weight of a CpuGemm is quantized."""
    (count, groups, _), group = node.inputs[2].shape, node.attrs["group"]
    minima = {"zero_dtype": FLOAT16} if node.attrs["zero_type"] < CODES else {}
    return quant(node.name, 16 * count, groups * group, node.attrs["bits"], group, **minima)


def read(text: str, weights: dict[str, Any]) -> gs.Graph:
    """The graph of a text; `weights` are fields of its quantized weights."""
    domains = [onnx.helper.make_opsetid(domain, version) for domain, version in (("", 23), ("com.microsoft", 1))]
    graph = gs.import_onnx(onnx.helper.make_model(onnx.parser.parse_graph(text), opset_imports=domains))
    given = {id(t) for t in graph.inputs}

    def is_weight(tensor: gs.Tensor) -> bool:
        return isinstance(tensor, gs.Variable) and bool(tensor.name) and not tensor.inputs and id(tensor) not in given

    strips = {node.name: Strips((quant_in_strips(node),)) for node in graph.nodes if node.op == GEMM.name}
    for node in graph.nodes:
        first = node.inputs[0] if node.inputs else None
        if node.op == GEMM.name:
            for tensor in filter(is_weight, node.inputs[1:3]):
                tensor.to_constant(View(strips[node.name], tuple(tensor.shape), np.uint8))
        elif node.op == "GatherBlockQuantized":
            path, (n, k) = first.name.removesuffix(".codes"), first.shape
            (whole,) = strips[path].weights if path in strips else (quant(path, n, k, node.attrs["bits"], **weights),)
            for tensor in filter(is_weight, (first, *node.inputs[2:])):
                tensor.to_constant(View(whole, tuple(tensor.shape), tensor.dtype))
        elif node.op == OP.name:
            n = node.inputs[2].shape[1] // 2
            whole = quant(
                node.name,
                n,
                node.attrs["group"] * node.inputs[2].shape[0],
                node.attrs["bits"],
                node.attrs["group"],
                **weights,
            )
            packed = Fragments((whole,), FLOAT16)
            for tensor, dtype in zip(node.inputs[1:3], (np.int8, FLOAT16), strict=True):
                tensor.to_constant(View(packed, tuple(tensor.shape), dtype))
        elif node.op == "DequantizeLinear" and is_weight(first):
            k, n = first.shape
            group = node.attrs.get("block_size", k)
            whole = quant(
                first.name.removesuffix(".codes"), n, k, 8 if first.dtype == np.uint8 else 4, group, **weights
            )
            for tensor in filter(is_weight, node.inputs):
                tensor.to_constant(View(whole, tuple(tensor.shape), tensor.dtype))
        for tensor in filter(is_weight, node.inputs):
            if tensor.name.endswith(SUFFIX):
                k, n = tensor.shape
                path = tensor.name.removesuffix(SUFFIX)
                tensor.to_constant(weight_constant(path, stored(path, n, k), (n, k))._values)
            elif len(tensor.shape) == 1:
                tensor.to_constant(np.ones(tensor.shape, tensor.dtype))
            else:
                tensor.to_constant(View(stored(tensor.name, *tensor.shape), tuple(tensor.shape), tensor.dtype))
    return graph


def cases() -> Iterator[Any]:
    """(file, before, what follows it: after, rejected or error, and its text)."""
    for path in sorted(TEXT.glob("*.txt")):
        parts = [part.split("\n", 1) for part in path.read_text().split("\n# ")[1:]]
        for i, ((_, before), after) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            yield pytest.param(path, before, *after, id=f"{path.stem}{i}")


@pytest.mark.parametrize(("path", "before", "kind", "expected"), list(cases()))
def test_a_pass_does_what_its_text_says(path: Path, before: str, kind: str, expected: str) -> None:
    given: dict[str, Any] = {}
    exec(path.read_text().partition("\n# ")[0], NAMES, given)
    graph, log = read(before, given.get("weights", {})), PassLog()
    untouched = text_of(graph)
    assert file_name(type(given["the_pass"])) == path.stem
    if kind == "error":
        with pytest.raises(UserError) as caught:
            run(graph, [given["the_pass"]], log)
        assert str(caught.value) == expected.strip()
        return
    run(graph, [given["the_pass"]], log)
    assert {entry.reason for entry in log.entries} == {expected.strip() if kind == "rejected" else ""}
    assert text_of(graph).strip() == (untouched if kind == "rejected" else expected).strip()


@pytest.mark.parametrize("name", PASSES)
def test_no_pass_is_without_a_text(name: str) -> None:
    kinds = {case.values[2] for case in cases() if case.values[0].stem == name}
    assert "after" in kinds, f"write tests/passes/text/{name}.txt"


def test_no_text_is_without_a_pass() -> None:
    assert {path.stem for path in TEXT.iterdir()} == set(PASSES)
