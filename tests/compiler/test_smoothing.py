"""Loud inputs of int8 linears: shared with the weights around them, which changes nothing but what rounding loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import generated
from instantrt.compiler.accuracy.importance import shared, smoothing
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend import load
from instantrt.compiler.request import Request
from instantrt.compiler.serving.runtime.onnx_engine import open_session
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.linear import NORMS
from instantrt.passes.core.names import LOGITS, PAST
from instantrt.passes.core.rewrite import PassLog
from instantrt.passes.float.smooth_products import factor_of
from tests.graphs import relative
from tests.models import make

CASES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"mlp_bias": True},
    "phi3": {},  # gate and up are one matrix
    "gpt_neox": {},  # no gate: norms alone
    "gemma2": {},  # norms behind linears, too, whose outputs are no one's inputs
}


@pytest.mark.parametrize("family", CASES)
def test_a_smoothed_model_computes_the_same(family: str, tmp_path: Path) -> None:
    """Whatever the powers of two are, behind every norm and of every gated product."""
    make(family, tmp_path / "model", **CASES[family])
    model = load(tmp_path / "model")
    graph, random = pipeline.normalize(model.graph, PassLog()), np.random.default_rng(0)
    found = {each.path: each for each in pipeline.linears(graph) if each.path != "lm_head"}
    kinds = {each.x.name: "norm" for each in found.values() if each.x.inputs[0].op in NORMS}
    kinds |= {each.x.name: "product" for each in found.values() if factor_of(each.x) is not None}
    widths = {each.x.name: each.shape[1] for each in found.values()}
    factors = {name: np.exp2(random.integers(-4, 5, widths[name])).astype(np.float32) for name in kinds}
    log = PassLog()
    smoothed, _ = pipeline.smooth_inputs(graph, {}, factors, set(found), log)
    assert sum(not entry.reason for entry in log.entries) == len(kinds)
    (feeds, _), *_ = generated(model, tokens=12).each(model.llm)
    want, got = (Evaluation(each, feeds).take(LOGITS) for each in (graph, smoothed))
    assert relative(got, want) < 1e-5
    assert set(kinds.values()) == ({"norm"} if family == "gpt_neox" else {"norm", "product"})
    assert not any(node.name.endswith("/smoothed") for node in smoothed.nodes), "the norms themselves are smoothed"
    assert smoothing(graph, set(found), model.llm, generated(model, tokens=12)).keys() <= kinds.keys()


def test_silence_and_what_is_not_finite_have_no_factors() -> None:
    ones = np.ones(4, np.float32)
    for loud in (np.zeros(4, np.float32), np.float32([1, np.nan, 1, 1]), np.float32([1, np.inf, 1, 1])):
        np.testing.assert_array_equal(shared(loud, ones, 0.5), ones)
    np.testing.assert_array_equal(shared(np.float32([1, 16, 1, 1]), ones, 0.5), np.float32([1, 4, 1, 1]))


def test_loud_channels_cost_a_causal_lm_less(tmp_path: Path) -> None:
    """Behind each norm, less than what its own weight tells of, and in each gated product."""
    theirs, loud = make("llama", tmp_path / "model"), [3, 17]
    for layer in theirs.model.layers:
        layer.mlp.up_proj.weight.data[loud] *= 64
        layer.mlp.down_proj.weight.data[:, loud] /= 64
        for norm, users in (("input", "qkv"), ("post_attention", ("gate", "up"))):
            getattr(layer, f"{norm}_layernorm").weight.data[loud] *= 8
            for user in users:
                part = layer.self_attn if norm == "input" else layer.mlp
                getattr(part, f"{user}_proj").weight.data[:, loud] /= 8
    theirs.save_pretrained(tmp_path / "loud")
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, theirs.config.vocab_size, (1, 24)))
    with torch.no_grad():
        want = theirs(ids).logits.numpy()
    errors = {}
    for search in ("none", None):
        out = tmp_path / str(search)
        request = Request(tmp_path / "loud", ("x86",), out, quant="a8w8", lm_head="float", logits="all", search=search)
        compile_model(request)
        session = open_session(out / "x86/model.onnx", 1)
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids), "position_ids": np.arange(24)[None]}
        pasts = (t for t in session.get_inputs() if t.name.startswith(PAST))
        empty = {t.name: np.zeros((1, t.shape[1], 0, t.shape[3]), np.float32) for t in pasts}
        errors[search] = relative(session.run([LOGITS], feeds | empty)[0], want)
    assert errors[None] < errors["none"] / 2, errors
