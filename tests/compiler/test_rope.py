"""Rotary tables that change with the length of the sequence: exact below the switch, refused beyond it.

Prompts up to the switch itself, padded left and right, and decode steps, against transformers in float32; tables that
do not change are compared far beyond the length that they were scaled from.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.compile import compile_model
from instantrt.compiler.frontend.hf import open_checkpoint
from instantrt.compiler.frontend.skeleton import build_skeleton
from instantrt.compiler.inspect import inspect
from instantrt.compiler.request import Request
from instantrt.passes.core.errors import UserError
from tests.checkpoints import write_checkpoint
from tests.models import SIZES, make

SWITCH = 16
BEYOND = f"rotary table changes[^$]*at most {SWITCH} tokens"
SHORT, LONG = [1.0 + i / 8 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
INSIDE = {**LONGROPE, "original_max_position_embeddings": SWITCH}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
NEVER = {"num_hidden_layers": 1, "sliding_window": None}
PHI3 = {**NEVER, "original_max_position_embeddings": SWITCH, "max_position_embeddings": 64}
TWO_KINDS = {"layer_types": ["full_attention", "sliding_attention"], "max_position_embeddings": 64}

CHANGING: dict[str, dict[str, Any]] = {
    "phi3": {"family": "phi3", **PHI3, "rope_parameters": LONGROPE},
    "phi3, factors of attention": {
        "family": "phi3", **PHI3, "rope_parameters": {**LONGROPE, "attention_factor": 1.7, "factor": 4.0}
    },
    "phi3, half of each head": {
        "family": "phi3", **PHI3, "partial_rotary_factor": 0.5,
        "rope_parameters": {**LONGROPE, "short_factor": SHORT[:4], "long_factor": LONG[:4]},
    },
    "llama, longrope": {"family": "llama", "num_hidden_layers": 1, "rope_parameters": INSIDE},
    "llama, dynamic": {
        "family": "llama", "num_hidden_layers": 1, "max_position_embeddings": SWITCH, "rope_parameters": DYNAMIC
    },
    "gemma3, in one kind of layer": {
        "family": "gemma3_text", **TWO_KINDS,
        "rope_parameters": {"full_attention": {**INSIDE, "rope_theta": 1e4}, "sliding_attention": PLAIN},
    },
}  # fmt: skip


def made(folder: Path, family: str, **fields: Any) -> Any:
    return make(family, folder, **deepcopy(fields))  # transformers writes into what it is given


def compiled(folder: Path, **fields: Any) -> Artifact:
    request = Request(folder, ("x86",), folder / "out", quant="none", logits="all", **fields)
    (artifact,) = compile_model(request)
    return artifact


def check(model: Any, folder: Path, artifact: Artifact, length: int) -> None:
    """Rows of `length`, and of 5 less that are padded left, then right: a prefill, and steps up to `length`."""
    session = ort.InferenceSession(folder / "out" / artifact.path, providers=["CPUExecutionProvider"])
    assert artifact.llm is not None
    texts = np.random.default_rng(0).integers(3, artifact.llm["vocab"], (2, length))
    for start, kept in ((length - 4, slice(5, None)), (length, slice(0, length - 5))):
        mask = np.ones_like(texts)
        mask[1] = 0
        mask[1, kept] = 1
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        told = np.where(mask, positions, 99)  # what is said of padding must choose no table
        with torch.no_grad():
            given = {"input_ids": texts, "attention_mask": mask, "position_ids": positions}
            want = model(**{name: torch.from_numpy(array) for name, array in given.items()}).logits.numpy()
        cache = empty(session, artifact.llm)
        for begin, end in ((0, start), *((n, n + 1) for n in range(start, length))):
            names = [o.name for o in session.get_outputs()]
            new = {"input_ids": texts[:, begin:end], "position_ids": told[:, begin:end]}
            got = dict(zip(names, session.run(None, {**new, "attention_mask": mask[:, :end], **cache}), strict=True))
            error = np.abs(got["logits"] - want[:, begin:end]) * mask[:, begin:end, None]
            assert error.max() < 1e-4 * np.abs(want).max(), (begin, end)
            cache = {name: got[name.replace("past_key_values", "present")] for name in cache}


def empty(session: ort.InferenceSession, llm: dict[str, int]) -> dict[str, np.ndarray]:
    past = np.zeros((2, llm["kv_heads"], 0, llm["head_dim"]), np.float32)
    return {i.name: past for i in session.get_inputs() if i.name.startswith("past_key_values.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGING)
def test_below_the_switch_an_artifact_is_exact(name: str, tmp_path: Path) -> None:
    model = made(tmp_path, **CHANGING[name])
    artifact = compiled(tmp_path, max_length=SWITCH)
    assert artifact.limits["max_length"] == SWITCH
    check(model, tmp_path, artifact, SWITCH)


@pytest.mark.parametrize("length", [None, SWITCH + 1])
@pytest.mark.parametrize("name", CHANGING)
def test_beyond_the_switch_is_refused(name: str, length: int | None, tmp_path: Path) -> None:
    """In the same words where the model is known from an earlier run."""
    fields = {key: value for key, value in CHANGING[name].items() if key != "family"}
    kind = {"gemma3, in one kind of layer": "gemma3_text"}.get(name, name.split(",", maxsplit=1)[0])
    write_checkpoint(tmp_path, {**SIZES, "head_dim": 16, **fields, "model_type": kind}, {})
    for _ in range(2):
        with pytest.raises(UserError, match=f"{BEYOND}[^$]*--max-length {SWITCH}"):
            open_checkpoint(tmp_path, max_length=length)


@pytest.mark.parametrize(
    ("targets", "given", "longest"),
    [
        (("sm89",), {}, 2048),
        (("sm89", "x86"), {}, None),
        (("x86",), {}, None),
        (("x86",), {"max_length": 9, "opt_length": None}, 9),
        (("sm89", "x86"), {"max_length": 600}, 600),
    ],
)
def test_the_longest_sequence_that_an_artifact_takes(
    targets: tuple[str, ...], given: dict[str, Any], longest: int | None
) -> None:
    """Engines have a limit of their own; what runs on a CPU takes as many tokens as the model can."""
    assert Request(Path("m"), targets, Path("o"), **given).longest_sequence() == longest


def test_a_checkpoint_is_inspected_without_a_length(tmp_path: Path) -> None:
    made(tmp_path, **CHANGING["phi3"])
    assert inspect(tmp_path).problems == ()


STATIC = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn, scaled attention": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.2, "mscale_all_dim": 0.8
    },
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", STATIC)
def test_other_tables_are_the_same_for_all_lengths(name: str, tmp_path: Path) -> None:
    model = made(tmp_path, "llama", num_hidden_layers=1, rope_parameters=STATIC[name])
    check(model, tmp_path, compiled(tmp_path), 40)


OLD_KEYS: dict[str, dict[str, Any]] = {
    "longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": SWITCH,
        "rope_scaling": {"type": "longrope"},
    },
    "dynamic": {"model_type": "llama", "max_position_embeddings": SWITCH, "rope_scaling": {"type": "dynamic"}},
    "rope_type": {"model_type": "llama", "max_position_embeddings": SWITCH, "rope_scaling": {"rope_type": "dynamic"}},
}


@pytest.mark.parametrize("name", OLD_KEYS)
def test_old_keys_are_understood(name: str, tmp_path: Path) -> None:
    config = {**SIZES, **OLD_KEYS[name]}
    config["rope_scaling"] = {"factor": 2.0, "short_factor": SHORT, "long_factor": LONG, **config["rope_scaling"]}
    write_checkpoint(tmp_path, config, {})
    with pytest.raises(UserError, match=BEYOND):
        open_checkpoint(tmp_path)


def test_an_unknown_kind_is_refused_by_name(tmp_path: Path) -> None:
    config = {**SIZES, "model_type": "llama", "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}
    with pytest.raises(UserError, match=r"rope_type that is not known[^$]*longrope[^$]*'spiral'"):
        build_skeleton(config, tmp_path, False)
