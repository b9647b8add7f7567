"""The armv9 artifacts on the real aarch64 ONNX Runtime, under emulation: `make test-arm`. Correctness, never speed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from instantrt import Request, compile_model
from instantrt.compiler.frontend.model import FloatModel
from tests.compiler.encoder_models import SIZES, make, sentence
from tests.conftest import compiled
from tests.graphs import relative

EMULATED = os.environ.get("ARM_PYTHON", "")
pytestmark = [
    pytest.mark.arm,
    pytest.mark.skipif(not EMULATED, reason="no aarch64 Python: `make test-arm` makes one and runs this ring"),
]
# Runs where neither onnx nor this project is: numpy and onnxruntime alone.
RUN = """
import sys
import numpy as np, onnxruntime as ort
model, feeds, out = sys.argv[1:]
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
np.savez(out, *session.run(None, dict(np.load(feeds))))
"""
# Float sums in another order turn an activation that lies between two codes to the other one now and then: two
# processors may differ by a few steps of what the mode keeps of an activation, 14 bits or 8.
MODES: dict[str, tuple[dict[str, Any], float]] = {
    "float": ({"quant": "none"}, 1e-5),
    "a16w8 exact": ({"quant": "a16w8", "group_size": -1, "cpu_preset": "exact", "lm_head": "float"}, 5e-4),
    "a16w8 g64 exact": ({"quant": "a16w8", "group_size": 64, "cpu_preset": "exact"}, 5e-4),
    "a16w8 fast": ({"quant": "a16w8", "cpu_preset": "fast"}, 1e-2),
    "a16w8 g32": ({"quant": "a16w8", "group_size": 32}, 1e-2),
    "a16w4 g32": ({"quant": "a16w4", "group_size": 32}, 1e-2),
    "a8w8": ({"quant": "a8w8"}, 1e-2),
    "a16w8 tables": ({"quant": "a16w8", "cpu_preset": "exact", "lm_head": "int8", "embeddings": "int8"}, 5e-4),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_arm_core_computes_what_this_one_does(tiny_float: FloatModel, tmp_path: Path, mode: str) -> None:
    """Prefill of a padded batch; logits and caches. Neoverse N2, and a core that has neither i8mm nor SVE."""
    fields, bound = MODES[mode]
    compiled(tmp_path, targets=("armv9",), **fields)
    shape = tiny_float.llm
    assert shape is not None
    rng = np.random.default_rng(0)
    mask = np.ones((2, 12), np.int64)
    mask[1, :4] = 0
    feeds = {
        "input_ids": rng.integers(0, shape.vocab, (2, 12)),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
        **{
            n: np.zeros((2, shape.kv_heads, 0, shape.head_dim), np.float32)
            for n in shape.cache_names("past_key_values")
        },
    }
    alike(tmp_path, feeds, bound)


@pytest.mark.parametrize("mode", ["a16w8", "a16w4", "a8w8"])
def test_an_encoder(tmp_path: Path, mode: str) -> None:
    make("bert", "AutoModel", tmp_path / "bert")
    sentence(tmp_path / "bert", ("Pooling", {"word_embedding_dimension": 32}, {}))
    compile_model(Request(tmp_path / "bert", ("armv9",), tmp_path / "out", quant=mode))
    ids, mask = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12)), np.ones((2, 12), np.int64)
    mask[1, 8:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    alike(tmp_path / "out", feeds, 1e-2 if mode == "a8w8" else 1e-5)


def alike(out: Path, feeds: dict[str, Any], bound: float) -> None:
    """Are outputs on Arm cores those of this one?"""
    model = out / "armv9/model.onnx"
    here = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)
    np.savez(out / "feeds.npz", **feeds)
    (out / "run.py").write_text(RUN)
    for core in ("neoverse-n2", "cortex-a76"):
        command = [EMULATED, out / "run.py", model, out / "feeds.npz", out / "out.npz"]
        subprocess.run(command, check=True, env={**os.environ, "ARM_CPU": core})
        there = np.load(out / "out.npz")
        for i, want in enumerate(here):
            assert relative(there[f"arr_{i}"], want) < bound, (core, i)
