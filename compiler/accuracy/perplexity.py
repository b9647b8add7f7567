"""Perplexity of a causal LM on a text: of a compiled artifact, or of transformers as the reference.

exp of the mean negative log likelihood of every token but the first of each window; windows do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from instantrt.compiler.accuracy.data import read_text, token_feeds, tokenizer_of, windows
from instantrt.compiler.accuracy.metrics import log_softmax, perplexity
from instantrt.compiler.accuracy.runners import session, transformers_runner
from instantrt.compiler.artifact.check import libraries_of
from instantrt.compiler.artifact.manifest import find_artifact
from instantrt.compiler.frontend.architecture import CAUSAL_LM, head_of
from instantrt.compiler.json_file import read_json
from instantrt.compiler.serving.runtime.onnx_engine import PAST, empty_cache
from instantrt.passes.core.errors import UserError, require, tried
from instantrt.passes.core.lazy import Array

Logits = Callable[[Array], Iterable[Array]]  # ids [1, S] -> their logits [s, vocab], piece by piece
WINDOW = 256
PIECE = 512  # tokens of a call: the logits of a long window would take gigabytes


def text_windows(folder: Path, text: Path, longest: int = 0, window: int = WINDOW) -> list[Array]:
    """Token ids [1, window] of consecutive parts of `text` by the tokenizer in `folder`; the last may be shorter.

    longest   tokens that the model takes, 0 where nothing says it
    """
    parts = list(windows(tokenizer_of(folder).encode(read_text(text)).ids, min(window, longest or window), batch=1))
    if not parts:
        raise UserError("the text is empty", where=str(text), expected="at least two tokens")
    return parts


def longest_of(folder: Path) -> int:
    """Tokens that the float checkpoint in `folder` takes, 0 where its config does not say it."""
    require("hf", "reading a float checkpoint")
    from transformers import AutoConfig

    with tried("reading the config with transformers", where=str(folder)):
        config = AutoConfig.from_pretrained(folder).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def perplexity_of(logits_of: Logits, parts: Sequence[Array]) -> float:
    return perplexity(np.concatenate([nll for ids in parts for nll in losses(logits_of(ids), ids[0])]))


def losses(pieces: Iterable[Array], ids: Array) -> Iterator[Array]:
    """The negative log likelihood of each of ids [S] but the first, by pieces [s, vocab]."""
    start = 0
    for logits in pieces:
        following = ids[start + 1 : start + 1 + len(logits)]
        yield -log_softmax(logits)[np.arange(len(following)), following]
        start += len(logits)


def artifact_logits(folder: Path, target: str | None = None) -> Logits:
    """The logits of a compiled ONNX artifact: of every position, where it delivers the last's, too.

    What a window's later pieces see of those before is the artifact's own cache, whatever it holds.
    """
    artifact = find_artifact(folder, target)
    if artifact.kind != "onnx" or artifact.llm is None:
        found = artifact.kind if artifact.kind != "onnx" else "another model"
        fix = "instantrt diff --forms twin,engine measures an engine on its GPU" if artifact.kind == "engine" else ""
        raise UserError("not a causal LM for ONNX Runtime", where=f"{folder}, {artifact.target}", found=found, fix=fix)
    loaded = session(folder / artifact.path, every_position=True, libraries=libraries_of(folder, artifact))
    whole = artifact.limits.get("prompts") == "whole"
    empty = {f"{PAST}{part}": buffer for part, buffer in empty_cache(loaded, 1, 0).items()}
    names = ["logits", *(name.replace(PAST, "present.") for name in empty)]

    def run(ids: Array) -> Iterator[Array]:
        feeds, cache = token_feeds(ids), empty
        size = ids.shape[1] if whole else PIECE
        for start in range(0, ids.shape[1], size):
            here = slice(start, start + size)
            given = {name: value[:, here] for name, value in feeds.items()}
            given["attention_mask"] = feeds["attention_mask"][:, : here.stop]
            logits, *present = loaded.run(names, given | cache)
            cache = dict(zip(empty, present, strict=True))
            yield logits[0]

    return run


def transformers_logits(folder: Path) -> Logits:
    """The logits of the float checkpoint in transformers, float32."""
    if (folder / "config.json").is_file():
        head = head_of(read_json(folder / "config.json"), str(folder), pooled=False)
        if head is not CAUSAL_LM:
            raise UserError("perplexity is of causal LMs", where=str(folder), found=f"a model to {head.task}")
    run = transformers_runner(folder)
    return lambda ids: run(token_feeds(ids))["logits"]
