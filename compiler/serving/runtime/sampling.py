"""Which token comes next: penalties, temperature, top_k, top_p and a seed, in the order of Hugging Face's generate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
SHORTLIST = 512  # top_p rarely keeps more; sorting a whole vocabulary takes as long as a decode step of a small model

COLDEST = 1e-6  # below it nothing but the largest has a chance, and float32 divides by nothing


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token; the penalties 1, 0 and 0 change nothing.

    repetition_penalty   divides positive logits of all tokens so far, the prompt's too, and multiplies negative ones
    frequency_penalty    is subtracted once for each time a token was generated
    presence_penalty     is subtracted once for each token that was generated
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, type, Callable[[float], bool], str], ...] = (
            ("temperature", Real, lambda x: x >= 0, "0 or more"),
            ("top_k", Integral, lambda x: x >= 0, "an integer, 0 or more"),
            ("top_p", Real, lambda x: 0 < x <= 1, "above 0, at most 1"),
            ("repetition_penalty", Real, lambda x: x > 0, "above 0"),
            ("frequency_penalty", Real, lambda x: True, "a number"),
            ("presence_penalty", Real, lambda x: True, "a number"),
            ("seed", Integral, lambda x: x >= 0, "an integer, 0 or more"),
        )
        for name, kind, fits, expected in rules:
            value = getattr(self, name)
            number = isinstance(value, kind) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and fits(value)):
                raise ValueError(f"{name}: expected {expected}, found {value}")


class Sampler:
    """Chooses the tokens of one sequence; its randomness starts from the seed, so a batch changes nothing."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)
        self.seen = set(prompt)
        self.counts: dict[int, int] = {}

    def choose(self, logits: Array) -> int:
        """The next token, from logits [vocab]; it counts as generated from now on."""
        s = self.sampling
        scores = self.penalized(logits)
        token = int(scores.argmax()) if s.temperature == 0 else self.draw(scores)
        self.seen.add(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        return token

    def penalized(self, logits: Array) -> Array:
        s = self.sampling
        if s.repetition_penalty == 1 and s.frequency_penalty == s.presence_penalty == 0:
            return logits
        scores = logits.astype(np.float64)
        seen = np.fromiter(self.seen, np.int64, len(self.seen))
        scores[seen] *= np.where(scores[seen] > 0, 1 / s.repetition_penalty, s.repetition_penalty)
        generated = np.fromiter(self.counts, np.int64, len(self.counts))
        times = np.fromiter(self.counts.values(), np.float64, len(self.counts))
        scores[generated] -= s.frequency_penalty * times + s.presence_penalty
        return scores

    def draw(self, scores: Array) -> int:
        s = self.sampling
        vocab = len(scores)
        weights = np.exp((scores - scores.max()) / max(s.temperature, COLDEST))
        total = weights.sum(dtype=np.float64)
        order = np.arange(vocab)
        if s.top_k and s.top_k < vocab:  # probabilities are relative to all that top_k keeps, not to a shortlist
            order = largest(weights, s.top_k)
            total = weights[order].sum(dtype=np.float64)
        elif s.top_p < 1:
            order = largest(weights, min(SHORTLIST, vocab))
            if weights[order].sum(dtype=np.float64) < s.top_p * total:
                order = largest(weights, vocab)
        p = weights[order].astype(np.float64) / total
        ends = np.cumsum(p)
        ends = ends[ends - p < s.top_p]
        place = np.searchsorted(ends, self.random.random() * ends[-1], side="right")
        return int(order[min(place, len(ends) - 1)])


def largest(scores: Array, count: int) -> Array:
    """Ids of the `count` largest scores, falling; equal scores by id. Sorts those alone."""
    ids = np.arange(len(scores))
    if count < len(scores):
        # Each of `count` pieces has a score that is no less than the least of their maxima.
        pieces = scores[: len(scores) // count * count].reshape(count, -1)
        ids = np.flatnonzero(scores >= pieces.max(axis=1).min())
        ids = ids[scores[ids] >= np.partition(scores[ids], -count)[-count]]
    order: Array = ids[np.lexsort((ids, -scores[ids]))][:count]
    return order
