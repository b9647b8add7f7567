"""Figures against their definitions, and data that says what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from instantrt.compiler.accuracy.bounds import INT8_LEVEL, int8_blocks
from instantrt.compiler.accuracy.data import load_data, windows
from instantrt.compiler.accuracy.forms import Budget
from instantrt.compiler.accuracy.metrics import (
    compare_tokens,
    difference,
    element_error,
    log_softmax,
    perplexity,
    summary,
)
from instantrt.compiler.frontend.model import FloatModel
from instantrt.passes.core.errors import UserError
from tests.conftest import TEXT

RANDOM = np.random.default_rng(11)


def test_token_figures_follow_their_definitions() -> None:
    reference, other = (RANDOM.standard_normal((2, 6, 50)) for _ in range(2))
    ids = RANDOM.integers(0, 50, (2, 6))
    tokens = compare_tokens(reference, other, ids)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (reference, other))
    assert tokens.kl == pytest.approx((p * np.log(p / q)).sum(-1).reshape(-1))
    assert tokens.nll_reference[2] == pytest.approx(-np.log(p[0, 2, ids[0, 3]]))
    assert tokens.nll[6] == pytest.approx(-np.log(q[1, 0, ids[1, 1]]))
    assert np.isnan(tokens.nll[[5, 11]]).all()
    five = [len(set(np.argsort(a)[-5:]) & set(np.argsort(b)[-5:])) / 5 for a, b in zip(p[0], q[0], strict=True)]
    assert tokens.top5[:6] == pytest.approx(five)
    assert (tokens.top1 == (p.argmax(-1) == q.argmax(-1)).reshape(-1)).all()
    assert summary(tokens)["kl_mean"] == pytest.approx(tokens.kl.mean())


def test_equal_models_differ_in_nothing_and_a_uniform_one_has_the_vocabulary_as_perplexity() -> None:
    logits = np.zeros((1, 9, 64), np.float32)
    tokens = compare_tokens(logits, logits, np.arange(9)[None])
    assert perplexity(tokens.nll) == pytest.approx(64)
    assert (tokens.kl == 0).all()
    assert summary(tokens)["top5_agreement"] == 1
    assert log_softmax(np.array([[1e4, 0.0]]))[0, 0] == 0  # no overflow


def test_one_wrong_channel_cannot_hide() -> None:
    b = RANDOM.standard_normal((30, 5000)).astype(np.float32)
    a = b.copy()
    a[:, 4500] *= 1.01
    found = difference(a, b)
    assert found.channel == pytest.approx(0.01, rel=1e-3)
    assert found.relative_l2 < 3e-4
    assert element_error(a, b, 1e-3) > 5e-3


def test_int8_blocks_are_exact_on_their_grid() -> None:
    x = np.array([[127, -64, 3, 1.27, 0.01, -0.64]], np.float32)
    assert int8_blocks(x, 3)[0] == pytest.approx([127, -64, 3, 1.27, 0.01, -0.64])
    assert np.abs(int8_blocks(x, 6) - x).max() > 0.2


@pytest.mark.parametrize("rows", [1, 64])
def test_int8_blocks_are_those_of_the_operator(rows: int) -> None:
    """In its ties, too, of which inputs on a coarse grid are full: a cache of four bits is one."""
    size, block = 64, 32
    steps = RANDOM.uniform(0.01, 1, (64, 1)).astype(np.float32)
    x = (RANDOM.integers(-20, 21, (64, size)) * steps).astype(np.float32)
    codes = (np.eye(size, dtype=np.uint8) + 128).reshape(size, size // block, block)  # y is what is made of x
    scales = np.ones(size * size // block, np.float32)
    attrs = {"K": size, "N": size, "bits": 8, "block_size": block, "accuracy_level": INT8_LEVEL}
    node = onnx.helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", **attrs)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (rows, size)) for name in "xy"]
    weights = [onnx.numpy_helper.from_array(value, name) for value, name in ((codes, "codes"), (scales, "scales"))]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {"x": part})[0] for part in np.split(x, 64 // rows)])
    assert (np.abs(found - int8_blocks(x, block)) < steps / 64).all()  # one of int8 is about 20 / 127 of them


def test_bounds_name_what_exceeds_them() -> None:
    figures = {"kl_mean": 0.02, "perplexity_ratio": 1.03}
    assert Budget().violations(figures) == []
    assert Budget(0.03, 4).violations(figures) == []
    assert len(Budget(0.01, 2).violations(figures)) == 2
    assert Budget(0.01).violations({"kl_mean": float("nan"), "perplexity_ratio": 1.0})


def test_a_text_is_cut_into_whole_windows_and_a_rest() -> None:
    batches = windows(range(11), window=2)
    assert [b.shape for b in batches] == [(4, 2), (1, 2)]
    assert [b.shape for b in windows(range(12), window=5)] == [(2, 5), (1, 2)]
    assert np.concatenate([b.reshape(-1) for b in windows(range(12), window=5)]).tolist() == list(range(12))


def test_data_says_what_it_is(tiny_float: FloatModel, tmp_path: Path) -> None:
    text = load_data(tiny_float, TEXT, limit=300)
    assert sum(b.size for b in text.batches) == 300
    assert text.warning == ""
    assert text.decode([int(i) for i in text.batches[0][0][:20]]) in TEXT.read_text()
    assert [b.shape[0] for b in load_data(tiny_float, prompts=["Once upon a time", "The end is near"]).batches] == [
        1,
        1,
    ]
    drawn, again = load_data(tiny_float), load_data(tiny_float)
    assert "GENERATED DATA" in drawn.warning
    assert all((a == b).all() for a, b in zip(drawn.batches, again.batches, strict=True))
    plain = load_data(replace(tiny_float, llm=None))
    assert plain.feeds[0]["input_ids"].shape == (8, 8)
    assert "GENERATED DATA" in plain.warning
    assert "--text" not in plain.warning  # such a model takes none
    assert [str(data) for data in (text, drawn, plain)] == [
        "text evaluation.txt: 300 tokens",
        "generated: 512 tokens",
        "generated inputs",
    ]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for file, message in (("empty.txt", "empty"), ("latin.txt", "cannot be read"), ("none.txt", "cannot be read")):
        with pytest.raises(UserError, match=message):
            load_data(tiny_float, tmp_path / file)
    with pytest.raises(UserError, match="less than two tokens"):
        load_data(tiny_float, prompts=[""])
