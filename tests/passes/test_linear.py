"""Linear layers as other exporters write them, against the model itself on ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.graphs import compiled_error, model_file

RANDOM = np.random.default_rng(4)
A, B = (RANDOM.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
WIDE, NARROW = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((64, 128), (128, 64)))
BIAS = RANDOM.standard_normal(64).astype(np.float32)
TINY = np.eye(64, 8, dtype=np.float32)  # small enough to be no reference

FIRST = '["/mlp/MatMul"] t = MatMul(x, a) u = Relu(t)'
SCOPES = {
    "two weights": (FIRST + '["/mlp/MatMul_1"] y = MatMul(u, b)', {"a": A, "b": B}),
    "two shapes": (FIRST + '["/mlp/MatMul_1"] y = MatMul(u, b)', {"a": WIDE, "b": NARROW}),
    "one weight twice": (FIRST + '["/mlp/MatMul_1"] y = MatMul(u, a)', {"a": A}),
    "a weight and its transpose": (FIRST + 'w = Transpose(a) ["/mlp/MatMul_1"] y = MatMul(u, w)', {"a": TINY}),
    "three": (
        FIRST + 'w = Transpose(b) ["/mlp/1"] v = MatMul(u, w) ["/mlp/2"] y = MatMul(v, b)',
        {"a": A, "b": B},
    ),
    "Gemm twice": (
        '["/mlp/Gemm"] t = Gemm(x, a, c) u = Relu(t) ["/mlp/Gemm_1"] y = Gemm(u, a, c)',
        {"a": A, "c": BIAS},
    ),
}


@pytest.mark.parametrize("quant", ["none", "a16w8"])
@pytest.mark.parametrize("scope", SCOPES)
def test_weights_of_one_scope_stay_apart(scope: str, quant: str, tmp_path: Path) -> None:
    model = model_file(tmp_path / "m.onnx", *SCOPES[scope])
    assert compiled_error(model, quant, tmp_path / "out") < (1e-6 if quant == "none" else 2e-2)


def test_a_weight_used_twice_is_stored_once(tmp_path: Path) -> None:
    for scope in ("one weight twice", "two weights"):
        compiled_error(model_file(tmp_path / "m.onnx", *SCOPES[scope]), "none", tmp_path / scope)
    once, twice = (
        (tmp_path / scope / "x86/model.onnx.data").stat().st_size for scope in ("one weight twice", "two weights")
    )
    assert twice == 2 * once


@pytest.mark.parametrize("perm", ["", "<perm = [1, 0]>", "<perm = [0, 1]>"])
def test_a_transpose_is_one_that_swaps(perm: str, tmp_path: Path) -> None:
    model = model_file(tmp_path / "m.onnx", f"w = Transpose{perm}(a) y = MatMul(x, w)", {"a": A})
    assert compiled_error(model, "none", tmp_path / "out") < 1e-6
