"""Perplexity of a causal LM on a text: of a compiled artifact, or of transformers as the reference.

exp of the mean negative log likelihood of every token but the first of each window; windows do not overlap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import typer
from tokenizers import Tokenizer

from instantrt.compiler.artifact.manifest import find_artifact
from instantrt.compiler.artifact.positions import open_every_position

Array = npt.NDArray[Any]
Logits = Callable[[Array], Array]  # ids [1, S] -> logits [1, S, vocab]
WINDOW = 256


def windows(tokenizer: Tokenizer, text: str, size: int = WINDOW) -> Iterator[Array]:
    """Token ids [1, size] of consecutive parts of `text`; the last may be shorter."""
    ids = np.array(tokenizer.encode(text).ids, np.int64)
    for start in range(0, len(ids) - 1, size):
        yield ids[None, start : start + size]


def perplexity(logits_of: Logits, parts: list[Array]) -> float:
    """Computed in float64."""
    total, count = 0.0, 0
    for ids in parts:
        logits = logits_of(ids)[0, :-1].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        total -= log_p[np.arange(len(log_p)), ids[0, 1:]].sum()
        count += len(log_p)
    return float(np.exp(total / count))


def artifact_logits(folder: Path, target: str | None = None) -> Logits:
    """The logits of a compiled ONNX artifact, without a past; of every position, even where it delivers the last's."""
    artifact = find_artifact(folder, target)
    assert artifact.llm is not None
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = open_every_position(folder / artifact.path, options)
    empty = np.zeros((1, artifact.llm["kv_heads"], 0, artifact.llm["head_dim"]), np.float32)
    past = {t.name: empty for t in artifact.inputs if t.name.startswith("past_key_values.")}

    def run(ids: Array) -> Array:
        tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
        logits: Array = session.run(["logits"], {**tokens, **past})[0]
        return logits

    return run


def transformers_logits(folder: Path) -> Logits:
    """The logits of the float checkpoint in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(ids: Array) -> Array:
        with torch.no_grad():
            logits: Array = model(torch.from_numpy(ids)).logits.numpy()
        return logits

    return run


def main(
    folder: Annotated[Path, typer.Argument(help="output folder of compile, or a float checkpoint")],
    text: Annotated[Path, typer.Option(help="the text")] = Path("examples/text/evaluation.txt"),
    target: Annotated[str | None, typer.Option(help="which artifact, where there are several")] = None,
) -> None:
    """Print the perplexity of a model on a text."""
    compiled = (folder / "manifest.json").is_file()
    side = (folder / find_artifact(folder, target).path).parent if compiled else folder
    parts = list(windows(Tokenizer.from_file(str(side / "tokenizer.json")), text.read_text("utf-8")))
    value = perplexity(artifact_logits(folder, target) if compiled else transformers_logits(folder), parts)
    print(json.dumps({"model": str(folder), "tokens": sum(p.shape[1] for p in parts), "perplexity": round(value, 4)}))


if __name__ == "__main__":
    typer.run(main)
