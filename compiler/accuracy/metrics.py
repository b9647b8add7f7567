"""Numbers that say how far two outputs are apart. All sums are float64, whatever the outputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from instantrt.passes.core.lazy import Array

FLOOR = 0.25  # a channel this much quieter than the average one is measured against the average: it may be cancellation
TOP = 5
COLUMNS = 4096


@dataclass(frozen=True)
class Difference:
    """relative_l2 = |a - b| / |b|; channel = the largest relative_l2 of one output channel."""

    relative_l2: float
    channel: float


def difference(a: Array, b: Array) -> Difference:
    """How far `a [..., N]` is from the reference `b [..., N]`."""
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    n = b.shape[-1]
    rows_a, rows_b = a.reshape(-1, n), b.reshape(-1, n)
    off, size = np.zeros(n), np.zeros(n)
    for at in range(0, n, COLUMNS):  # a vocabulary of logits in float64, all at once, would be gigabytes
        part = slice(at, at + COLUMNS)
        wide = rows_b[:, part].astype(np.float64)
        delta = rows_a[:, part].astype(np.float64) - wide
        off[part], size[part] = np.linalg.norm(delta, axis=0), np.linalg.norm(wide, axis=0)
    whole = max(float(np.linalg.norm(size)), np.finfo(np.float64).tiny)
    quiet = FLOOR * whole / np.sqrt(n)
    return Difference(float(np.linalg.norm(off)) / whole, float((off / np.maximum(size, quiet)).max()))


def element_error(a: Array, b: Array, floor: float, channels: Array | float = 0.0) -> float:
    """The largest |a - b| / (|b| + floor * the largest |b| of the channel), of `a, b [..., N]`.

    A channel of nothing but tiny values counts as a thousandth of the loudest one.

    channels   [N]: the largest of each channel at least, where `b` has not all of it
    """
    wide = b.reshape(-1, b.shape[-1]).astype(np.float64)
    off = np.abs(a.reshape(wide.shape).astype(np.float64) - wide)
    loudest = np.maximum(np.abs(wide).max(axis=0, initial=np.finfo(np.float32).tiny), channels)
    with np.errstate(invalid="ignore"):  # a NaN stays one, and is no error below any bound
        return float((off / (np.abs(wide) + floor * np.maximum(loudest, loudest.max() / 1000))).max())


@dataclass(frozen=True)
class Tokens:
    """What happened at each position of a text; every array has one element a position.

    kl      D_KL(reference || other) of the next-token distribution, in nats
    top1    both have the same most likely token
    top5    the share of the reference's five most likely tokens that are among the other's five
    nll     -log p(the text's own next token), reference and other; NaN where the text ends
    best    the most likely token, reference and other
    """

    kl: Array
    top1: Array
    top5: Array
    nll_reference: Array
    nll: Array
    best_reference: Array
    best: Array

    @staticmethod
    def join(parts: list[Tokens]) -> Tokens:
        names = Tokens.__dataclass_fields__
        return Tokens(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def compare_tokens(reference: Array, other: Array, ids: Array) -> Tokens:
    """Logits [B, S, V] of two models on the token ids [B, S], row by row: positions in reading order."""
    return Tokens.join([compare_row(*row) for row in zip(reference, other, ids, strict=True)])


def compare_row(reference: Array, other: Array, ids: Array) -> Tokens:
    """Logits [S, V] against each other; position i predicts ids[i + 1]."""
    p, q = log_softmax(reference), log_softmax(other)
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0)  # a rounding below zero is zero
    best_p, best_q = (np.argpartition(-x, TOP, axis=-1)[:, :TOP] for x in (p, q))
    top5 = (best_p[:, :, None] == best_q[:, None, :]).any(axis=2).mean(axis=1)
    first_p, first_q = p.argmax(axis=-1), q.argmax(axis=-1)
    return Tokens(kl, first_p == first_q, top5, next_nll(p, ids), next_nll(q, ids), first_p, first_q)


def log_softmax(logits: Array) -> Array:
    wide: Array = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def next_nll(log_p: Array, ids: Array) -> Array:
    """[S] with NaN at the last position, whose next token nobody knows."""
    found = -np.take_along_axis(log_p[:-1], ids[1:, None].astype(np.int64), axis=-1)[:, 0]
    return np.append(found, np.nan)


def perplexity(nll: Array) -> float:
    return float(np.exp(np.nanmean(nll)))


def summary(tokens: Tokens) -> dict[str, Any]:
    """The figures of a report."""
    reference, other = perplexity(tokens.nll_reference), perplexity(tokens.nll)
    return {
        "tokens": len(tokens.kl),
        "kl_mean": float(tokens.kl.mean()),
        "kl_p99": float(np.quantile(tokens.kl, 0.99)),
        "kl_max": float(tokens.kl.max()),
        "top1_agreement": float(tokens.top1.mean()),
        "top5_agreement": float(tokens.top5.mean()),
        "perplexity_reference": reference,
        "perplexity": other,
        "perplexity_ratio": other / reference,
    }
