"""What is exported without torch's decompositions computes what the model does; what needs them goes through them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch.export import ExportedProgram

from instantrt.compiler.frontend.export import to_onnx

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


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_computes_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spared, function = CASES[case]
    whole, traced = ExportedProgram.run_decompositions, []
    monkeypatch.setattr(ExportedProgram, "run_decompositions", lambda *a: traced.append(a) or whole(*a))

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")},)
    program = torch.export.export(Model().eval(), (X,), dynamic_shapes=dynamic, strict=False)
    model = ir.to_proto(to_onnx(program, Names).model)  # type: ignore[arg-type]
    assert (not traced) == spared
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in (X, torch.cat([X, -X], 1)[:1]):
        (found,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, function(x).numpy(), rtol=1e-6, atol=1e-6)
