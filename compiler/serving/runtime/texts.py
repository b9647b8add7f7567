"""Texts as batches of an encoder's inputs: cut to the longest it takes, short ones together, padded on the right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cpus import usable_cpus
from .text import open_tokenizer, read, token_text

Array = npt.NDArray[Any]
Texts = Sequence[str | tuple[str, str]]  # a text, or two that are read together, for a reranker say
# Classes that take tokenizer.json as it is; their models have no kinds of tokens, unless model_input_names says so.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer")
MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"  # problem_type of config.json
OLD_ACTIVATION = "sbert_ce_default_activation_function"
# Of a batch, at most, and of padding behind one of its texts (docs/facts.md, "Texts that run together").
TOKENS, PADDING = 256, 16
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TextReader:
    """The tokenizer in `folder`, for a model whose manifest says `about` texts what `encoder` there has."""

    def __init__(self, folder: Path, about: Mapping[str, Any], inputs: Sequence[str] = INPUTS) -> None:
        self.tokenizer = open_tokenizer(folder)
        config = read(folder / "tokenizer_config.json")
        if about["max_length"]:
            side = "left" if config.get("truncation_side") == "left" else "right"
            self.tokenizer.enable_truncation(about["max_length"], direction=side)
        self.about, self.inputs = about, inputs
        named = config.get("model_input_names") or ([] if config.get("tokenizer_class") in GENERIC else INPUTS)
        self.typed = INPUTS[2] in named  # else all tokens are of one kind for whoever trained it
        # The model's own number comes first: some find the last token of a text by it.
        token, said = token_text(config.get("pad_token")), read(folder / "config.json").get("pad_token_id")
        known = said if type(said) is int and said >= 0 else self.tokenizer.token_to_id(token) if token else None
        self.pad: int = known or 0

    def prompt(self, name: str | None) -> str:
        """What is put in front of texts: the prompt of that name, or the model's own choice; ValueError for no such."""
        prompts, name = self.about["prompts"], self.about["default_prompt"] if name is None else name
        if name and name not in prompts:
            expected = f"one of {', '.join(sorted(prompts))}" if prompts else "none: this model has no prompts"
            raise ValueError(f"prompt_name: expected {expected}, found {name}")
        return str(prompts[name]) if name else ""

    def rows(self, texts: Texts, prompt: str = "") -> list[Any]:
        """Tokens of each text."""

        def ready(text: str) -> str:
            return text.lower() if self.about["lowercase"] else text

        given = [ready(prompt + t) if isinstance(t, str) else (ready(t[0]), ready(t[1])) for t in texts]
        rows: list[Any] = self.tokenizer.encode_batch(given)
        return rows

    def batches(self, rows: Sequence[Any], size: int) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """(which rows, their inputs): longest first, at most `size` together; fewer where they are long or differ."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        while order:
            longest = max(1, len(rows[order[0]].ids))
            few = order[: min(size, max(1, TOKENS // longest))]
            part = [index for index in few if longest - len(rows[index].ids) <= PADDING]
            order = order[len(part) :]
            yield part, self.feeds([rows[index] for index in part])

    def feeds(self, rows: Sequence[Any]) -> dict[str, Array]:
        """The inputs [B, S] of some rows."""
        shape = len(rows), max(1, *(len(row.ids) for row in rows))
        filled = {name: np.full(shape, self.pad if name == INPUTS[0] else 0, np.int64) for name in self.inputs}
        for index, row in enumerate(rows):
            types = row.type_ids if self.typed else [0] * len(row.ids)
            values = dict(zip(INPUTS, (row.ids, [1] * len(row.ids), types), strict=True))
            for name in self.inputs:
                filled[name][index, : len(row.ids)] = values[name]
        return filled


def answered(
    session: Any, batches: Iterable[tuple[list[int], dict[str, Array]]], threads: int
) -> Iterator[tuple[list[int], Array]]:
    """(which rows, what the model says of them) of each batch. Several run at once: a run leaves CPUs idle.

    threads   as the session was opened with
    """
    batches = list(batches)
    parts, feeds = [part for part, _ in batches], [each for _, each in batches]

    def run(each: dict[str, Array]) -> Array:
        found: Array = session.run(None, each)[0]
        return found

    if len(parts) < 2:  # a thread costs as much as a short text
        yield from zip(parts, map(run, feeds), strict=True)
        return
    with ThreadPoolExecutor(threads or usable_cpus()) as pool:
        yield from zip(parts, pool.map(run, feeds), strict=True)


def scoring(folder: Path, labels: Sequence[str]) -> str:
    """What makes scores of logits: `softmax`; `sigmoid` of each label by itself, where there is one or several may be
    right; or `identity`, where the model's config says that they are what they are."""
    config = read(folder / "config.json")
    own = (config.get("sentence_transformers") or {}).get("activation_fn") or config.get(OLD_ACTIVATION) or ""
    if config.get("problem_type") == REGRESSION or str(own).endswith(".Identity"):
        return "identity"
    alone = len(labels) == 1 or config.get("problem_type") == MULTI_LABEL or str(own).endswith(".Sigmoid")
    return "sigmoid" if alone else "softmax"


def best_labels(logits: Array, labels: Sequence[str], by: str) -> tuple[list[list[str]], Array]:
    """Of logits [B, L] labels and scores [B, L] of each row, the best first; `by` as `scoring` says."""
    scores = logits.astype(np.float64)
    if by == "sigmoid":
        scores = 1 / (1 + np.exp(-scores))
    elif by == "softmax":
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[labels[at] for at in row] for row in order], np.take_along_axis(scores, order, axis=1).astype(np.float32)
