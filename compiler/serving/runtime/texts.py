"""Texts as batches of an encoder's inputs: cut to the longest it takes, short ones together, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .text import SPECIAL_TOKENS, read, token_text

Array = npt.NDArray[Any]
Texts = Sequence[str | tuple[str, str]]  # a text, or two that are read together, for a reranker say
MULTI_LABEL = "multi_label_classification"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TextReader:
    """The tokenizer in `folder`, for a model whose manifest says `about` texts what `encoder` there has."""

    def __init__(self, folder: Path, about: Mapping[str, Any], inputs: Sequence[str] = INPUTS) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()  # files say how texts were cut and padded in a training
        self.tokenizer.no_truncation()
        if about["max_length"]:
            self.tokenizer.enable_truncation(about["max_length"])
        self.about, self.inputs = about, inputs
        token = token_text(read(folder / "tokenizer_config.json").get(SPECIAL_TOKENS[3]))
        known = self.tokenizer.token_to_id(token) if token else None
        self.pad: int = read(folder / "config.json").get("pad_token_id") or 0 if known is None else known

    def prompt(self, name: str | None) -> str:
        """What is put in front of texts: the prompt of that name, or the model's own choice; ValueError for no such."""
        prompts, name = self.about["prompts"], self.about["default_prompt"] if name is None else name
        if name and name not in prompts:
            raise ValueError(f"prompt_name: expected one of {', '.join(sorted(prompts)) or 'none'}, found {name}")
        return str(prompts[name]) if name else ""

    def rows(self, texts: Texts, prompt: str = "") -> list[Any]:
        """Tokens of each text."""

        def ready(text: str) -> str:
            return text.lower() if self.about["lowercase"] else text

        given = [ready(prompt + t) if isinstance(t, str) else (ready(t[0]), ready(t[1])) for t in texts]
        rows: list[Any] = self.tokenizer.encode_batch(given)
        return rows

    def batches(self, rows: Sequence[Any], size: int) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """(which rows, their inputs): longest first, `size` together."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        for start in range(0, len(order), size):
            part = order[start : start + size]
            yield part, self.feeds([rows[index] for index in part])

    def feeds(self, rows: Sequence[Any]) -> dict[str, Array]:
        """The inputs [B, S] of some rows."""
        shape = len(rows), max(1, *(len(row.ids) for row in rows))
        filled = {name: np.full(shape, self.pad if name == INPUTS[0] else 0, np.int64) for name in self.inputs}
        for index, row in enumerate(rows):
            values = dict(zip(INPUTS, (row.ids, [1] * len(row.ids), row.type_ids), strict=True))
            for name in self.inputs:
                filled[name][index, : len(row.ids)] = values[name]
        return filled


def each_by_itself(folder: Path, labels: Sequence[str]) -> bool:
    """Are scores those of each label by itself? There is one, or the model's config says that several may be right."""
    return len(labels) == 1 or read(folder / "config.json").get("problem_type") == MULTI_LABEL


def best_labels(logits: Array, labels: Sequence[str], *, apart: bool) -> tuple[list[list[str]], Array]:
    """Of logits [B, L] labels and scores [B, L] of each row, the best first: sigmoids where `apart`, else softmax."""
    wide = logits.astype(np.float64)
    if apart:
        scores = 1 / (1 + np.exp(-wide))
    else:
        scores = np.exp(wide - wide.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")
    return [[labels[at] for at in row] for row in order], np.take_along_axis(scores, order, axis=1).astype(np.float32)
