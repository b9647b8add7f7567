"""How far the answers of two forms of a model are apart, on each step and output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.steps import CHANGED, Call
from instantrt.passes.core.lazy import Array

LOGITS, PRESENT = "logits", "present."
VISIBLE = 1e-2  # a part of its largest value by which a token moves that sees another one; beyond any rounding
MASKED = -3e4  # values this low are masks, of words that cannot come, say: every form has its own minus infinity


@dataclass(frozen=True)
class Distance:
    """Of one output of one step: relative L2, the largest difference, the largest value.

    odd   why there is none, in words: another shape or other integers, which are infinitely far; a NaN in one of them.
          `largest` values of all `of` are others then
    """

    step: str
    output: str
    relative: float = 0.0
    largest: float = 0.0
    of: float = 0.0
    odd: str = ""

    @property
    def share(self) -> float:
        """How much of the output is wrong: of its size, or of its values where they have none."""
        if not self.odd:
            return self.relative
        return self.largest / self.of if self.of else 0.0

    def within(self, bound: float) -> bool:
        return not self.odd and self.relative <= bound


def distances(found: Answers, expected: Answers, steps: Sequence[Call]) -> Iterator[Distance]:
    """Everything that `found` has; `steps` say where an output means something."""
    by_name = {step.name: step for step in steps}
    for name, outputs in found.items():
        for output, value in outputs.items():
            step = by_name.get(name, Call(name, {}))
            yield distance(name, output, *meaning(output, value, expected[name][output], step))


def meaning(output: str, value: Array, expected: Array, step: Call) -> tuple[Array, Array]:
    """Both at the positions that count; logits of the last token alone against the last that counts of each row."""
    if output == LOGITS and value.ndim == 3:
        value, expected = np.maximum(value, MASKED), np.maximum(expected, MASKED)
        tokens = np.ones(expected.shape[:2], bool) if step.tokens is None else step.tokens
        if value.shape[1] == 1 < expected.shape[1]:
            last = tokens.shape[1] - 1 - tokens[:, ::-1].argmax(axis=1)
            return value[:, 0], expected[np.arange(len(last)), last]
        return (value[tokens], expected[tokens]) if value.shape == expected.shape else (value, expected)
    cache = output.startswith(PRESENT) and value.ndim == 4 and value.shape == expected.shape
    if cache and step.keys is not None and value.shape[2] == step.keys.shape[1]:
        return value.swapaxes(1, 2)[step.keys], expected.swapaxes(1, 2)[step.keys]
    return value, expected


def distance(step: str, output: str, value: Array, expected: Array) -> Distance:
    if value.shape != expected.shape:
        return Distance(step, output, math.inf, odd=f"has shape {list(value.shape)}, not {list(expected.shape)}")
    if value.dtype.kind not in "fV" or expected.dtype.kind not in "fV":
        count = int((value != expected).sum())
        if count:
            odd = f"has {count} of {value.size} values that are others"
            return Distance(step, output, math.inf, count, value.size, odd)
        return Distance(step, output)
    a, b = value.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isneginf(b) & (a <= MASKED))
    if others := int((~same & ~(finite & np.isfinite(a))).sum()):
        odd = "is not finite where it should be, or the other way round"
        return Distance(step, output, math.nan, others, b.size, odd)
    delta, size = a[finite] - b[finite], np.linalg.norm(b[finite])
    off, largest = np.linalg.norm(delta), float(np.abs(delta).max(initial=0))
    relative = float(off / size) if size else math.inf if off else 0.0
    return Distance(step, output, relative, largest, float(np.abs(b[finite]).max(initial=0)))


def not_finite(answers: Answers, steps: Sequence[Call], *, every: bool) -> tuple[str, str] | None:
    """(step, output) of the first that has values that mean something and are not finite; where `every` is asked for,
    nothing else. Random inputs may well have no logarithm."""
    by_name: Mapping[str, Call] = {step.name: step for step in steps}
    for name, outputs in answers.items():
        for output, value in outputs.items():
            if value.dtype.kind == "f" and value.size:
                counted, _ = meaning(output, value, value, by_name.get(name, Call(name, {})))
                finite = np.isfinite(counted)
                if not (finite.any() if every else finite.all()):
                    return name, output
    return None


def moved(answers: Answers, like: Answers | None = None) -> bool | None:
    """Does the first token see the last one? None where nothing says so.

    Seen in its logits; where only the last token's are delivered (by `like`), in what the cache keeps of it.
    """
    pair = [answers[name] for name in ("prefill", CHANGED) if name in answers]
    shape = (like or answers).get("prefill", {})
    if len(pair) < 2 or LOGITS not in shape:
        return None
    caches = [name for name in shape if name.startswith(PRESENT)]
    output = LOGITS if shape[LOGITS].shape[1] > 1 else caches[-1] if caches else ""
    if not output:
        return None
    before, after = (outputs[output][:, 0] if output == LOGITS else outputs[output][:, :, 0] for outputs in pair)
    return bool(np.abs(after - before).max() > VISIBLE * np.abs(before).max())
