"""Decomposed GELUs: each way that exporters write them becomes one node of the same value; near misses stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import small
from instantrt.passes.core.rewrite import PassLog, add, run
from instantrt.passes.float.fuse_gelu import FuseGelu


class Expression:
    """A graph of one input written like arithmetic: every call adds a node."""

    def __init__(self) -> None:
        self.x = gs.Variable("x", np.float32, ("M", 8))
        self.graph, self.count = gs.Graph(inputs=[self.x], opset=23), 0

    def __call__(self, op: str, *inputs: gs.Tensor | float) -> gs.Tensor:
        self.count += 1
        tensors = [
            small(f"c{self.count}_{i}", t, np.float32) if isinstance(t, float) else t for i, t in enumerate(inputs)
        ]
        return add(self.graph, op, tensors, gs.Variable(f"t{self.count}", np.float32, ("M", 8)))


def erf(e: Expression, x: gs.Tensor) -> gs.Tensor:
    return e("Add", e("Erf", e("Div", x, math.sqrt(2))), 1.0)


def tanh(e: Expression, x: gs.Tensor, power: float = 3.0, factor: float = 0.044715) -> gs.Tensor:
    cube = e("Mul", e("Pow", x, power), factor)
    return e("Add", e("Tanh", e("Mul", e("Add", x, cube), math.sqrt(2 / math.pi))), 1.0)


def tanh_fast(e: Expression, x: gs.Tensor, root: float = 0.7978845608) -> gs.Tensor:
    """transformers' gelu_fast: tanh(x * root * (1 + 0.044715 * x * x))."""
    square = e("Mul", e("Mul", x, 0.044715), x)
    return e("Add", e("Tanh", e("Mul", e("Mul", x, root), e("Add", square, 1.0))), 1.0)


FORMS: dict[str, tuple[str, Callable[[Expression], gs.Tensor]]] = {
    # as transformers' gelu_python and gelu_new are exported
    "half first": ("none", lambda e: e("Mul", e("Mul", e.x, 0.5), erf(e, e.x))),
    "tanh": ("tanh", lambda e: e("Mul", e("Mul", 0.5, e.x), tanh(e, e.x))),
    "fast": ("tanh", lambda e: e("Mul", e("Mul", e.x, 0.5), tanh_fast(e, e.x))),
    # as torch's older exporter writes its own gelu
    "half last": ("none", lambda e: e("Mul", e("Mul", e.x, erf(e, e.x)), 0.5)),
    "half inside": ("tanh", lambda e: e("Mul", e.x, e("Mul", 0.5, tanh(e, e.x)))),
    "reciprocal": (
        "none",
        lambda e: e("Mul", e("Mul", e.x, 0.5), e("Add", 1.0, e("Erf", e("Mul", e.x, math.sqrt(0.5))))),
    ),
}
NEAR_MISSES: dict[str, Callable[[Expression], gs.Tensor]] = {
    "another x": lambda e: e("Mul", e("Mul", e("Neg", e.x), 0.5), erf(e, e.x)),
    "another half": lambda e: e("Mul", e("Mul", e.x, 0.501), erf(e, e.x)),
    "a quotient of two": lambda e: e("Mul", e("Mul", e.x, 0.5), erf(e, e("Div", e.x, e("Add", e.x, 1.0)))),
    "another power": lambda e: e("Mul", e("Mul", e.x, 0.5), tanh(e, e.x, power=2.0)),
    "another root": lambda e: e("Mul", e("Mul", e.x, 0.5), tanh_fast(e, e.x, root=0.798)),
    "a constant more": lambda e: e("Mul", e("Mul", e.x, 0.5), erf(e, e("Add", e.x, 0.01))),
    "quick_gelu": lambda e: e("Mul", e.x, e("Sigmoid", e("Mul", e.x, 1.702))),
    "another factor": lambda e: e("Mul", e("Mul", e.x, 0.5), tanh(e, e.x, factor=0.0447)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_one_gelu(form: str) -> None:
    approximate, build = FORMS[form]
    e = Expression()
    y = build(e)
    e.graph.outputs = [y]
    x = np.linspace(-4, 4, 40, dtype=np.float32).reshape(5, 8)
    before = Evaluation(e.graph, {"x": x}).take(y.name)
    fused = run(e.graph, [FuseGelu()], PassLog())
    assert [(node.op, node.attrs["approximate"]) for node in fused.nodes] == [("Gelu", approximate)]
    assert np.allclose(Evaluation(fused, {"x": x}).take(y.name), before, atol=1e-6)


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses_stay(form: str) -> None:
    e = Expression()
    e.graph.outputs = [NEAR_MISSES[form](e)]
    assert "Gelu" not in {node.op for node in run(e.graph, [FuseGelu()], PassLog()).nodes}
