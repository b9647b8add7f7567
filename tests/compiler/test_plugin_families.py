"""What real exporters leave around the linears of several families, and that the plugin's node takes all of it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantrt.compiler import pipeline
from instantrt.compiler.backend.tensorrt.profiles import EngineLimits
from instantrt.compiler.frontend import load
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.quant import InstantQuant, QuantTensor
from instantrt.passes.core.rewrite import PassLog
from instantrt.plugins.weight_only_gemm.op import OP
from instantrt.plugins.weight_only_gemm.semantics import GELU, GELU_TANH, NONE, SILU
from tests.conftest import plugin_library
from tests.models import make

pytestmark = pytest.mark.slow

F16 = np.dtype(np.float16)
NEOX = {"model_type": "gpt_neox", "num_key_value_heads": 4, "tie_word_embeddings": True}
OURS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gpt_neox": NEOX,
    "gpt_neox-erf": {**NEOX, "hidden_act": "gelu_python"},
    "phi": {},  # gelu_new, in pieces
    "llama-bias": {"model_type": "llama", "mlp_bias": True},
}
#            (activation, gated, bias) of an MLP's nodes
MLP = {
    "gemma": [(GELU_TANH, 1, False), (NONE, 0, False)],
    "gpt_neox": [(GELU, 0, True), (NONE, 0, True)],
    "gpt_neox-erf": [(GELU, 0, True), (NONE, 0, True)],
    "phi": [(GELU_TANH, 0, True), (NONE, 0, True)],
    "llama-bias": [(SILU, 1, True), (NONE, 0, True)],
}


@pytest.mark.parametrize("family", OURS)
def test_mlps_are_two_nodes(family: str, tmp_path: Path) -> None:
    make(family, tmp_path, num_hidden_layers=1, **OURS[family])
    model, decisions = load(tmp_path), {}
    graph = pipeline.normalize(model.graph, PassLog())
    for layer in pipeline.linears(graph):
        source = InstantQuant(layer.path, layer.rows, 4, 32, False, F16)
        decisions[layer.path] = QuantTensor(layer.path, source, layer.shape, 4, 32, False, F16)
    twin = pipeline.quantize(graph, decisions, PassLog())
    request = Request(tmp_path, ("sm89",), tmp_path, logits="all", plugin=plugin_library(tmp_path))
    lowered = pipeline.lower_tensorrt(
        twin.copy(), find_target("sm80"), F16, request, EngineLimits(1, 64, 16), PassLog()
    )

    mlp = [n for n in lowered.nodes if n.op == OP.name and ".layers.0.mlp" in n.name]
    found = [(n.attrs["activation"], n.attrs["gated"], len(n.inputs) == len(OP.inputs)) for n in mlp]
    assert found == MLP[family]
    assert not {"Gelu", "Erf", "Sigmoid"} & {n.op for n in lowered.nodes}

    feeds = {t.name: np.zeros([s if isinstance(s, int) else 1 for s in t.shape], t.dtype) for t in lowered.inputs}
    for name, value in {"input_ids": [[7, 11, 13]], "attention_mask": [[1, 1, 1]], "position_ids": [[0, 1, 2]]}.items():
        feeds[name] = np.array(value, np.int64)
    feeds = {n: v[:, :, :0] if n.startswith("past_key_values") else v for n, v in feeds.items()}
    narrow = Evaluation(lowered, feeds).take("logits")
    wide = {n: v.astype(np.float32) if v.dtype == F16 else v for n, v in feeds.items()}
    exact = Evaluation(twin, wide).take("logits")
    assert np.linalg.norm(narrow - exact) <= 5e-3 * np.linalg.norm(exact), "float16 rounding through a layer"
