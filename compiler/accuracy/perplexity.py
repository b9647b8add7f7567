"""Perplexity of a causal LM on a text: of a compiled artifact, or of transformers as the reference.

exp of the mean negative log likelihood of every token but the first of each window; windows do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from instantrt.compiler.accuracy.data import llm_feeds, read_text, token_feeds, tokenizer_of, windows
from instantrt.compiler.accuracy.metrics import log_softmax, next_nll, perplexity
from instantrt.compiler.accuracy.runners import onnx_runner, transformers_runner
from instantrt.compiler.artifact.manifest import find_artifact
from instantrt.compiler.frontend.model import LlmShape
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.lazy import Array

Logits = Callable[[Array], Array]  # ids [1, S] -> logits [1, S, vocab]
WINDOW = 256


def text_windows(folder: Path, text: Path, longest: int = 0) -> list[Array]:
    """Token ids [1, WINDOW] of consecutive parts of `text` by the tokenizer in `folder`; the last may be shorter.

    longest   tokens that the model takes, 0 where nothing says it
    """
    return list(windows(tokenizer_of(folder).encode(read_text(text)).ids, min(WINDOW, longest or WINDOW), batch=1))


def perplexity_of(logits_of: Logits, parts: Sequence[Array]) -> float:
    return perplexity(np.concatenate([next_nll(log_softmax(logits_of(ids)[0]), ids[0]) for ids in parts]))


def artifact_logits(folder: Path, target: str | None = None) -> Logits:
    """The logits of a compiled ONNX artifact without a past: of every position, where it delivers the last's, too."""
    artifact = find_artifact(folder, target)
    if artifact.kind != "onnx" or artifact.llm is None:
        found = artifact.kind if artifact.kind != "onnx" else "another model"
        fix = "instantrt diff --forms twin,engine measures an engine on its GPU" if artifact.kind == "engine" else ""
        raise UserError("not a causal LM for ONNX Runtime", where=f"{folder}, {artifact.target}", found=found, fix=fix)
    llm = LlmShape(**artifact.llm)
    run = onnx_runner(folder / artifact.path, ["logits"], every_position=True)
    return lambda ids: run(llm_feeds(ids, llm))["logits"]


def transformers_logits(folder: Path) -> Logits:
    """The logits of the float checkpoint in transformers, float32."""
    run = transformers_runner(folder)
    return lambda ids: run(token_feeds(ids))["logits"]
