"""How far the answers of two forms of a model are apart, on each step and output."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from instantrt.compiler.smoke.names import LOGITS, PRESENT
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.steps import Call
from instantrt.passes.core.lazy import Array

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

    def found(self) -> str:
        return f"{self.output} {self.odd or f'is off by {self.relative:.1e} of its size'}"


def distances(found: Answers, expected: Answers, steps: Sequence[Call]) -> Iterator[Distance]:
    """Everything that `found` has; `steps` say where an output means something."""
    for step, output, value in each_output(found, steps):
        yield distance(step.name, output, *meaning(output, value, expected[step.name][output], step))


def each_output(answers: Answers, steps: Sequence[Call]) -> Iterator[tuple[Call, str, Array]]:
    by_name = {step.name: step for step in steps}
    for name, outputs in answers.items():
        for output, value in outputs.items():
            yield by_name.get(name, Call(name, {})), output, value


def meaning(output: str, value: Array, expected: Array, step: Call) -> tuple[Array, Array]:
    """Both at the positions that count; logits of the last token alone against the last that counts of each row."""
    if output == LOGITS and value.ndim == 3:
        value, expected = np.maximum(value, MASKED), np.maximum(expected, MASKED)
        tokens = np.ones(expected.shape[:2], bool) if step.tokens is None else step.tokens
        if value.shape[1] == 1 < expected.shape[1]:
            last = tokens.shape[1] - 1 - tokens[:, ::-1].argmax(axis=1)
            return value[:, 0], expected[np.arange(len(last)), last]
        return (value[tokens], expected[tokens]) if value.shape == expected.shape else (value, expected)
    counted = step.counted(output, value.shape) if value.shape == expected.shape else None
    return (value, expected) if counted is None else (value[counted], expected[counted])


def distance(step: str, output: str, value: Array, expected: Array) -> Distance:
    if value.shape != expected.shape:
        return Distance(step, output, math.inf, odd=f"has shape {list(value.shape)}, not {list(expected.shape)}")
    if output.startswith(PRESENT) and value.dtype == expected.dtype and value.dtype.itemsize == 1:
        return codes_distance(step, output, codes_of(output, value), codes_of(output, expected))
    if value.dtype.kind not in "fV" or expected.dtype.kind not in "fV":
        count = int((value != expected).sum())
        if count:
            odd = f"has {count} of {value.size} values that are others"
            return Distance(step, output, math.inf, count, value.size, odd)
        return Distance(step, output)
    a, b = value.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not (finite.all() and np.isfinite(a).all()):
        same = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isneginf(b) & (a <= MASKED))
        if others := int((~same & ~(finite & np.isfinite(a))).sum()):
            odd = "is not finite where it should be, or the other way round"
            return Distance(step, output, math.nan, others, b.size, odd)
        a, b = a[finite], b[finite]
    delta, size = a - b, norm(b)
    off, largest = norm(delta), float(np.abs(delta).max(initial=0))
    relative = float(off / size) if size else math.inf if off else 0.0
    return Distance(step, output, relative, largest, float(np.abs(b).max(initial=0)))


def codes_of(output: str, value: Array) -> Array:
    """A cache's integers; where two of four bits share a byte, [..., 2] of them."""
    pairs = value.dtype == np.uint8 and output.endswith((".key", ".value"))
    return np.stack([value & 15, value >> 4], axis=-1).astype(int) if pairs else value.astype(int)


def codes_distance(step: str, output: str, value: Array, expected: Array) -> Distance:
    """The sum of differences over the sum of magnitudes: where a last bit turns a tie, a step of the scale is rare, and
    on average as large as the difference of what was rounded."""
    off, largest = np.abs(value - expected), float(np.abs(expected).max(initial=0))
    relative = float(off.sum() / max(1, np.abs(expected).sum()))
    return Distance(step, output, relative, float(off.max(initial=0)), largest)


def norm(values: Array) -> float:
    """Of float64 [n]; BLAS's own would wake all of its threads for it."""
    return math.sqrt(float(np.square(values).sum()))


def not_finite(answers: Answers, steps: Sequence[Call], *, every: bool) -> tuple[str, str] | None:
    """(step, output) of the first that has values that mean something and are not finite; where `every` is asked for,
    nothing else. Random inputs may well have no logarithm."""
    for step, output, value in each_output(answers, steps):
        if value.dtype.kind == "f" and value.size:
            counted, _ = meaning(output, value, value, step)
            finite = np.isfinite(counted)
            if not (finite.any() if every else finite.all()):
                return step.name, output
    return None
