"""Encoders of every family on the kernels for CPUs: each artifact is held against its twin when it is compiled."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from instantrt.compiler.compile import compile_model
from instantrt.compiler.request import Request
from instantrt.plugins.ops import DOMAIN
from tests.compiler.encoder_models import make

TWO = {"num_attention_heads": 2}  # heads of 16 channels
SHARED = {**TWO, "num_key_value_heads": 1, "head_dim": 16}
# family -> its heads, and how many of its two layers have their attention on a kernel of ours
FAMILIES = {
    "bert": (TWO, 2),
    "roberta": (TWO, 2),
    "xlm-roberta": (TWO, 2),
    "distilbert": ({**TWO, "n_heads": 2}, 2),
    "modernbert": (TWO, 2),  # queries and keys are rotated; a window hides all keys of some padding
    "mpnet": (TWO, 0),  # two masks
    "electra": (TWO, 2),
    "albert": (TWO, 2),
    "convbert": ({"num_attention_heads": 4, "hidden_size": 64, "embedding_size": 64}, 2),
    "deberta-v2": (TWO, 0),  # scores of three products
    "qwen3": (SHARED, 2),
    "gemma3_text": (SHARED, 2),  # another scale
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path, cpu_library: Path) -> None:
    fields, attentions = FAMILIES[family]
    make(family, "AutoModel", tmp_path / "model", **fields)
    compile_model(Request(tmp_path / "model", ("x86",), tmp_path / "out", quant="a8w8", plugin=cpu_library))
    graph = onnx.load(tmp_path / "out" / "x86" / "model.onnx", load_external_data=False).graph
    found = [node.op_type for node in graph.node if node.domain == DOMAIN]
    assert found.count("CpuWholeAttention") == attentions
    assert found.count("CpuGemm") > attentions
