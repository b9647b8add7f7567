"""Models that read texts and predict no next token: the texts as inputs, and how alike two forms' answers are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from instantrt.compiler.frontend.model import EncoderShape
from instantrt.compiler.serving.runtime.texts import TextReader
from instantrt.passes.core.lazy import Array

TEXTS = 256  # of a file; all pairs of them are ranked
SHORTEST = 3  # words
BATCH = 8
END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")  # of a sentence, or of a paragraph without one


def sentences(text: str) -> list[str]:
    """The first texts of a file that say something."""
    found = (" ".join(each.split()) for each in END.split(text))
    return [each for each in found if each.count(" ") + 1 >= SHORTEST][:TEXTS]


def text_batches(texts: Sequence[str], reader: TextReader, most: int | None = None) -> Iterator[dict[str, Array]]:
    """The inputs of an encoder for `texts`, or for those that begin within `most` tokens."""
    rows = reader.rows(texts, reader.prompt(None))
    if most is not None:
        ends = np.cumsum([len(row.ids) for row in rows])
        rows = rows[: int(np.searchsorted(ends, most)) + 1]
    yield from (feeds for _, feeds in reader.batches(rows, BATCH))


def answers(outputs: Mapping[str, Array], feeds: Mapping[str, Array], encoder: EncoderShape) -> Array:
    """What a form says, a row each: of a text its embedding, the mean of its hidden states or its classes; of a token
    its classes."""
    (value,) = outputs.values()
    counts = feeds["attention_mask"].astype(bool)
    if encoder.task == "hidden":
        return np.stack([row[keep].mean(axis=0) for row, keep in zip(value, counts, strict=True)])
    return value if value.ndim == 2 else np.asarray(value[counts])


def likeness(reference: Array, other: Array, encoder: EncoderShape) -> dict[str, float]:
    """The figures of a report: cosines of rows, of embeddings whether all pairs rank alike, of classes whether the
    first is the same."""
    a, b = (rows.astype(np.float64) for rows in (reference, other))
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.where(size > 0, (a * b).sum(axis=1) / np.where(size > 0, size, 1), (a == b).all(axis=1))
    found = {"rows": float(len(a)), "cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}
    if encoder.task in ("embed", "hidden"):
        return found | ({"rank_agreement": ranked_alike(a, b)} if len(a) > 2 else {})
    return found | {"label_agreement": float((a.argmax(axis=1) == b.argmax(axis=1)).mean())}


def ranked_alike(a: Array, b: Array) -> float:
    """Spearman's rank correlation of the cosines of all pairs of rows [T, W]."""
    pairs = np.triu_indices(len(a), 1)
    ranks = []
    for rows in (a, b):
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        ranks.append(np.argsort(np.argsort((unit @ unit.T)[pairs], kind="stable")))
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
