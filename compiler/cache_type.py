"""What the KV cache holds: which types a target has, and the scales or centers of integers, from one run of the model.

No data is asked for: tokens are drawn at random. Of eight bits a channel's range is what it reaches for these, with a
margin for text, which reaches farther; what exceeds it saturates. Of four bits a key's center is its mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.frontend.model import FloatModel
from instantrt.compiler.request import Request
from instantrt.compiler.say import Say
from instantrt.compiler.target import Backend, Target
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import FLOAT32, Array
from instantrt.passes.core.names import IDS, MASK, PAST, POSITIONS, PRESENT
from instantrt.passes.core.rewrite import Pass, PassLog, producer, run
from instantrt.passes.qdq.quantize_cache import QuantizeCache
from instantrt.passes.qdq.quantize_cache_by_token import QuantizeCacheByToken

INTEGERS = ("int8", "uint4")
ROWS, TOKENS = 4, 128  # of what the range is measured on
MARGIN = 2  # over what these reach: what saturates costs more than coarser steps (docs/facts.md, "Caches of integers")

NO_ENGINE = ("float32", "uint4")  # whatever it computes in
LEAST = 2.0**-20


def check_cache_type(request: Request, types: Mapping[str, np.dtype[Any]] | None = None) -> None:
    """Refuses a type that a target has no cache of; `types`: what each engine computes in, where that is known."""
    for target in request.resolved_targets():
        dtype, ours = (types or {}).get(target.name), request.library(target) is not None and not request.portable
        check_target(request.kv_cache_type, request.kv_cache, target, dtype, ours=ours)


def check_target(
    kind: str | None, growth: str, target: Target, dtype: np.dtype[Any] | None = None, *, ours: bool = False
) -> None:
    """`dtype`: what its engine computes in; None for a CPU, and where it is not known yet. `ours`: attention is."""
    where, engine = f"{target.name} ({target.family})", target.backend is Backend.TENSORRT
    computes = f"{dtype.name if dtype is not None else '16 bits'}, in which it computes"
    if not engine and kind == "float16" and not ours:
        raise UserError(
            "no float16 cache on a CPU",
            where=where,
            expected="float32, int8 or uint4",
            found="GroupQueryAttention takes a float16 cache only with float16 queries, and is slower with both",
            fix="--plugin auto without --portable, for attention that has one" if target.plugin else "",
        )
    if engine and kind == "int8" and not target.whole_operators:
        raise UserError(
            "no int8 cache in this engine",
            where=where,
            expected=computes,
            found=f"the parser of TensorRT {target.tensorrt} has no Concat of int8",
            fix=f"compile for {target.name} apart",
        )
    if engine and kind == "int8" and growth == "in-place":
        raise UserError(
            "no int8 cache in place in an engine",
            where=where,
            found="TensorScatter takes float32, float16 and bfloat16 alone",
            fix="--kv-cache concat, or another --kv-cache-type",
        )
    if engine and (kind in NO_ENGINE or (dtype is not None and kind not in (None, "int8", dtype.name))):
        raise UserError(
            f"no {kind} cache in this engine",
            where=where,
            expected=computes + (", or int8" if target.whole_operators else ""),
            found="TensorRT has no operators on bytes of two codes" if kind == "uint4" else str(kind),
            fix=f"compile for {target.name} apart",
        )


def with_cache(
    graph: gs.Graph, kind: str, model: FloatModel, length: int, log: PassLog, say: Say = lambda text: None
) -> gs.Graph:
    """The canonical graph `graph` with a cache of integers; UserError names the first that stays float.

    length   the tokens that its artifacts take, 0 where nothing says it
    """
    assert model.llm is not None
    say("measuring the cache's range")
    each: Pass
    if kind == "int8":
        each = QuantizeCache({name: scale_of(most) for name, most in bounds(graph, model).items()})
    else:
        each = QuantizeCacheByToken(centers(graph, model, length))
    run(graph, [each], log)
    left = [t for t in graph.inputs if t.name in model.llm.input_names() and t.dtype == FLOAT32]
    if left:
        reasons = dict.fromkeys(e.reason for e in log.entries if e.by is each and e.reason)
        raise UserError(
            f"this cache cannot be {kind}",
            where=left[0].name,
            expected="Concat(past, new) that only Attention reads",
            found="; ".join(reasons),
            fix="leave --kv-cache-type out",
        )
    return graph


def scale_of(most: Array) -> Array:
    """One step of a channel that reaches `most`, in 8 bits and no less than float16 has: exact in every engine, and the
    same on machines whose sums differ in their last bits."""
    return np.maximum(MARGIN * most / 127, LEAST).astype(ml_dtypes.bfloat16).astype(FLOAT32)


def bounds(graph: gs.Graph, model: FloatModel) -> dict[str, Array]:
    """`i.key` and `i.value` -> float32 [H, D], the largest magnitude that each channel reaches at any position."""
    presents = {t.name: t for t in graph.outputs if t.name.startswith(PRESENT)}
    once = run_on_random_tokens(graph, model, presents)
    pairs = {name: list(rotated(tensor, once)) for name, tensor in presents.items()}
    return {name.removeprefix(PRESENT): bound(once.take(name), pairs[name]) for name in presents}


def centers(graph: gs.Graph, model: FloatModel, length: int) -> dict[str, Array]:
    """`i.key` -> float32 [H, D], the mean of each channel over positions that are spread over `length`.

    Slow pairs of a rotary embedding keep a direction for thousands of tokens, quick ones have no mean. In 8 bits, which
    are the same on machines whose sums differ in their last ones.
    """
    keys = [t.name for t in graph.outputs if t.name.startswith(PRESENT) and t.name.endswith(".key")]
    once = run_on_random_tokens(graph, model, keys, spread_over=length)
    means = {name: once.take(name).mean(axis=(0, 2)) for name in keys}
    return {name.removeprefix(PRESENT): mean.astype(ml_dtypes.bfloat16).astype(FLOAT32) for name, mean in means.items()}


def run_on_random_tokens(graph: gs.Graph, model: FloatModel, keep: Iterable[str], spread_over: int = 0) -> Evaluation:
    """Rows of tokens, at positions one after the other, or as far apart as fit into `spread_over`."""
    assert model.llm is not None
    ids = np.random.default_rng(0).integers(0, model.llm.vocab, (ROWS, min(TOKENS, model.llm.max_length or TOKENS)))
    ones = np.ones_like(ids)
    positions = (np.cumsum(ones, axis=1) - 1) * max(1, spread_over // ids.shape[1])
    pasts = (t for t in graph.inputs if t.name.startswith(PAST))
    empty = {t.name: np.zeros((ROWS, t.shape[1], 0, t.shape[3]), FLOAT32) for t in pasts}
    return Evaluation(graph, {IDS: ids, MASK: ones, POSITIONS: positions} | empty, keep=keep)


def bound(values: Array, pairs: Iterable[tuple[Array, Array]]) -> Array:
    """The largest of values [B, H, T, D] in each channel; of two channels that rotate into one another, of both.

    A rotation by the position keeps x1^2 + x2^2, and slow ones take thousands of tokens to show a channel's largest.
    """
    peak = np.abs(values)
    for first, second in pairs:
        radius = np.hypot(values[..., first], values[..., second])
        peak[..., first], peak[..., second] = radius, radius
    largest = peak.max(axis=(0, 2))
    return np.where(largest, largest, np.float32(1))


def rotated(present: gs.Tensor, once: Evaluation) -> Iterator[tuple[Array, Array]]:
    """The channels of `present` = Concat(past, new) that a rotary embedding turns: first and second of each pair."""
    concat = producer(present, "Concat")
    new = concat.inputs[1] if concat is not None and len(concat.inputs) == 2 else present
    part = producer(new, "Concat")  # of a rotated part of each head and the rest
    rotary = producer(part.inputs[0] if part is not None else new, "RotaryEmbedding")
    if rotary is not None:
        half = np.arange(once.peek(rotary.inputs[1].name).shape[-1])  # the cosines of the pairs
        yield (2 * half, 2 * half + 1) if rotary.attrs.get("interleaved") else (half, half + len(half))
