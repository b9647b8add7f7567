"""Causal LMs of several families: exported from untouched storage, their logits equal transformers'.

Prefill of a left-padded batch, then a decode step on its cache; the FLOAT graph, the one in the operators of an old
TensorRT, and the one lowered for ONNX Runtime.
Rows of different lengths, padded on the right, in a cache of fixed length: each is what it is alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch

from instantrt.compiler import pipeline
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend import load
from instantrt.compiler.frontend.hf_attention import attention
from instantrt.compiler.frontend.model import LlmShape
from instantrt.compiler.frontend.skeleton import build_skeleton, read_by_transformers
from instantrt.compiler.request import Request
from instantrt.compiler.target import find_target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.rewrite import PassLog, run
from instantrt.passes.tensorrt.kv_in_place import kv_in_place
from tests.models import FAMILIES, SIZES, make

PARTS = {"gpt_neox": ("LayerNormalization", "gpt_neox.layers.1.mlp.dense_4h_to_h")}
BATCH, SEQUENCE, PADDING = 2, 9, 3
STEPS, LENGTH = 4, 24
FLOAT32 = np.dtype(np.float32)


def reference(model: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Any = None) -> Any:
    with torch.no_grad():
        tensors = (torch.from_numpy(a) for a in (ids, mask, positions))
        names = ("input_ids", "attention_mask", "position_ids")
        return model(**dict(zip(names, tensors, strict=True)), past_key_values=past, use_cache=True)


def check(graph: gs.Graph, shape: LlmShape, model: Any, folder: Path) -> None:
    """Prefill and decode against transformers, within 1e-4."""
    write_model(graph, folder / "m.onnx")
    session = ort.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    ids = rng.integers(3, shape.vocab, (BATCH, SEQUENCE))
    mask = np.ones((BATCH, SEQUENCE), np.int64)
    mask[1, :PADDING] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    empty = np.zeros((BATCH, shape.kv_heads, 0, shape.head_dim), np.float32)
    past = dict.fromkeys(shape.cache_names("past_key_values"), empty)
    got = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    want = reference(model, ids, mask, positions)
    error = np.abs(got[0] - want.logits.numpy()[:, -got[0].shape[1] :])
    error[1, : PADDING if error.shape[1] > 1 else 0] = 0  # what a padded position says is nobody's business
    assert error.max() < 1e-4

    ids, mask = rng.integers(3, shape.vocab, (BATCH, 1)), np.concatenate([mask, np.ones((BATCH, 1), np.int64)], 1)
    positions = mask.cumsum(1)[:, -1:] - 1
    past = dict(zip(shape.cache_names("past_key_values"), got[1:], strict=True))
    got = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
    want = reference(model, ids, mask, positions, want.past_key_values)
    assert np.abs(got[0] - want.logits.numpy()).max() < 1e-4


def check_lengths(graph: gs.Graph, shape: LlmShape, model: Any, folder: Path) -> None:
    """Rows of SEQUENCE and SEQUENCE - PADDING tokens, then STEPS more under a mask of the cache's full length."""
    write_model(graph, folder / "m.onnx")
    session = ort.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    lengths = np.array([SEQUENCE, SEQUENCE - PADDING])
    texts = np.random.default_rng(0).integers(3, shape.vocab, (BATCH, SEQUENCE + STEPS))
    want = [reference(model, text[None], *alone(len(text))).logits[0].numpy() for text in texts]
    past = dict.fromkeys(
        shape.cache_names("past_key_values"), np.zeros((BATCH, shape.kv_heads, LENGTH, shape.head_dim), np.float32)
    )
    ids, mask = texts[:, :SEQUENCE], (np.arange(SEQUENCE) < lengths[:, None]).astype(np.int64)
    positions = np.arange(SEQUENCE)[None].repeat(BATCH, 0)
    for step in range(STEPS):
        got = session.run(None, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past})
        for row, n in enumerate(lengths + step):
            last = n - 1 if got[0].shape[1] > 1 else 0
            assert np.abs(got[0][row, last] - want[row][n - 1]).max() < 1e-4, (step, row)
        past = dict(zip(past, got[1:], strict=True))
        done = lengths + step
        ids, positions = texts[np.arange(BATCH), done][:, None], done[:, None]
        mask = (np.arange(LENGTH) <= done[:, None]).astype(np.int64)


def alone(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask and positions of one whole text."""
    return np.ones((1, length), np.int64), np.arange(length)[None]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    model = make(family, tmp_path)
    exported = load(tmp_path)
    assert exported.llm is not None
    assert not any("exported" in note for note in exported.notes), "two layers are exported as they are"
    graph = pipeline.normalize(exported.graph, PassLog())
    ops = {n.op for n in graph.nodes}
    norm, down = PARTS.get(family, ("RMSNormalization", "model.layers.1.mlp.down_proj"))
    assert {norm, "RotaryEmbedding"} <= ops
    assert "ReduceMean" not in ops  # no norm was left in pieces
    names = [f.path for f in pipeline.linears(graph)]
    assert down in names
    assert "lm_head" in names
    check(graph, exported.llm, model, tmp_path)
    decomposed = pipeline.decompose(graph.copy(), FLOAT32, PassLog())
    assert not {"Attention", "RMSNormalization", "RotaryEmbedding"} & {n.op for n in decomposed.nodes}
    check(decomposed, exported.llm, model, tmp_path)
    request = Request(model=tmp_path, targets=("x86",), out=tmp_path)
    longest = exported.llm.max_length
    lowered = pipeline.lower_onnxruntime(graph.copy(), find_target("x86"), request, PassLog(), longest)
    assert lowered.outputs[0].shape[1] == 1
    check(lowered, exported.llm, model, tmp_path)
    every = replace(request, logits="all")
    every = pipeline.lower_onnxruntime(graph.copy(), find_target("x86"), every, PassLog(), longest)
    check(every, exported.llm, model, tmp_path)
    if family == "gemma2":  # no Attention operator caps its scores: the cache has to grow
        with pytest.raises(UserError, match="cannot be updated in place"):
            run(graph.copy(), kv_in_place(LENGTH), PassLog())
        return
    check_lengths(lowered, exported.llm, model, tmp_path)
    check_lengths(every, exported.llm, model, tmp_path)
    check_lengths(run(graph.copy(), kv_in_place(LENGTH), PassLog()), exported.llm, model, tmp_path)


@pytest.mark.slow
def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    make("llama", tmp_path, num_hidden_layers=1)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 256'))
    with pytest.raises(UserError, match=r"disagrees with the model's config\n  expected: shape \[.*256.*\]"):
        load(tmp_path)


def test_a_model_that_brings_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "m.M"}}')
    with pytest.raises(UserError, match="--trust-remote-code"):
        load(tmp_path)


@pytest.mark.parametrize("config", ['{"model_type": "vit"}', '{"model_type": "nosuch"}', "{}"])
def test_what_is_no_causal_lm_is_refused(tmp_path: Path, config: str) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("nonsense", "found"),
    [
        ({"hidden_size": "abc"}, "expected int, got str"),
        ({"hidden_size": -1}, "Error: "),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"vocab_size": 0}, "IndexError"),
    ],
)
def test_nonsense_in_a_config_is_named_in_a_few_words(nonsense: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_skeleton({**SIZES, "model_type": "llama", **nonsense}, tmp_path, False)
    assert caught.value.where == str(tmp_path / "config.json")
    assert found in caught.value.found
    assert len(caught.value.found) <= 200


def test_a_config_is_read_as_transformers_reads_its_file() -> None:
    olmo = read_by_transformers(
        {**SIZES, "model_type": "olmo", "clip_qkv": {"__float__": "Infinity"}, "auto_map": None}
    )
    assert olmo.clip_qkv == float("inf")
    assert read_by_transformers({**SIZES, "model_type": "llama", "return_dict": False}).return_dict
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    assert read_by_transformers({**SIZES, "model_type": "mistral", **kinds}).model_type == "ministral"


def test_attention_that_reads_more_than_it_says_is_refused() -> None:
    """A bias or sinks, of code that a model brings, would be lost."""
    tensor = torch.ones(1, 2, 3, 4)
    attention(torch.nn.Identity(), tensor, tensor, tensor, tensor, dropout=0.0, position_ids=tensor, is_causal=True)
    with pytest.raises(UserError, match="attention that reads position_bias"):
        attention(torch.nn.Identity(), tensor, tensor, tensor, tensor, position_ids=tensor, position_bias=tensor)


@pytest.mark.parametrize("model_type", ["nosuch", "mamba", "vit", None, []])
def test_a_model_type_without_a_road_is_refused_by_its_name(model_type: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"InstantRT compiles no |nothing here says which model") as caught:
        build_skeleton({"model_type": model_type}, tmp_path, False)
    assert repr(model_type) in str(caught.value)


def test_storage_stays_untouched(tmp_path: Path) -> None:
    """A model of 70 B parameters is built in no time and no memory."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    started = time.monotonic()
    config = {**SIZES, "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    model = build_skeleton({**config, "num_attention_heads": 64, "vocab_size": 128_000}, tmp_path, False)
    assert sum(p.numel() for p in model.parameters()) > 68e9
    assert time.monotonic() - started < 20
    assert resident() - before < 200 << 20
