"""What is exported without torch's decompositions computes what the model does; what needs them goes through them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter

from instantrt.compiler.frontend import export

X = torch.linspace(-3, 3, 2 * 6 * 8).reshape(2, 6, 8)


def changed(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 7
    return y


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.view(*x.shape[:2], 2, 4).transpose(2, 3)


CASES: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "casts": (True, lambda x: x.to(torch.float64).to(torch.float32).to("cpu").float() * 2),
    "a cast to integers": (True, lambda x: (x.to(torch.int64) + 1).to(torch.float32) * x),
    "masks": (True, lambda x: torch.where((x > 0) & (x < 2) | (x < -2), x, 0.0)),
    "a copy in another shape": (True, lambda x: turned(x).reshape(*x.shape[:2], -1) + 1),
    "dropout of a model that is not trained": (True, lambda x: torch.dropout(x, 0.5, False) * 2),
    "numbers of three types": (True, lambda x: x.to(torch.int64) * x + (x > 0) - x.abs().to(torch.int32)),
    "sizes": (True, lambda x: torch.arange(x.shape[1] * 2 - 1) + x[0, 0, 0]),
    "a cast that is the output": (False, lambda x: x.to(torch.int64)),
    "what changes in place": (False, lambda x: x.clone().add_(1).mul_(x)),
    "what changes a part in place": (False, changed),
    "no operator of ONNX, and a decomposition": (False, lambda x: torch.square(x) - x),
    "no operator of ONNX, and none that is announced": (False, lambda x: turned(x).reshape_as(x) + x),
}


class Names:
    """The interface of a model with one input."""

    @staticmethod
    def input_names() -> list[str]:
        return ["x"]

    @staticmethod
    def output_names() -> list[str]:
        return ["y"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def exported(function: Callable[[torch.Tensor], torch.Tensor]) -> onnx.ModelProto:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},)
    program = torch.export.export(Model().eval(), (X,), dynamic_shapes=dynamic, strict=False)
    return ir.to_proto(export.to_onnx(program, Names).model)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_computes_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spared, function = CASES[case]
    whole, traced = ExportedProgram.run_decompositions, []
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *a: traced.append(a) or whole(*a))
    model = exported(function)
    assert (not traced) == spared
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (X, torch.cat([X, -X], 1)[:1]):
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, function(x).numpy(), rtol=1e-6, atol=1e-6)


def test_types_are_made_alike_without_running_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graph, of fewer operators that were run: casts, and what reads them."""
    run, ran = Interpreter.call_function, list[str]()
    monkeypatch.setattr(Interpreter, "call_function", lambda self, *a: ran.append(str(a[0])) or run(self, *a))
    function = CASES["numbers of three types"][1]
    known = exported(function)
    assert "prims.convert_element_type.default" in ran
    assert not {"aten._to_copy.default", "aten.abs.default"} & set(ran)
    ran.clear()
    monkeypatch.setattr(export, "known_values", nullcontext)
    assert exported(function) == known
    assert {"aten._to_copy.default", "aten.abs.default"} <= set(ran)
