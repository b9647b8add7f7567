"""What an error in one layer's output costs the model: its share of the residual stream, and a few measurements.

An error matters by what it is of the stream that it is added to, token by token: attention and gates lie between, so
they are run. What the layers behind make of it is much the same factor for all kinds of layers (docs/facts.md, "Losses
of layers add up"), and is measured for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.layer_errors import TwinLinear
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.lazy import Array

KINDS = 32  # at most as many are measured
TINY = float(np.finfo(np.float64).tiny)


def kind_of(path: str) -> str:
    """`model.layers.3.mlp.up_proj` -> `model.layers.*.mlp.up_proj`, and as much of every number."""
    return re.sub(r"\d+", "*", path)


@dataclass(frozen=True)
class Stream:
    """The tensor that all of a layer's output is added to, the sum; and what depends on that output before it."""

    name: str
    between: frozenset[str]


def stream_of(y: str, wiring: Wiring) -> Stream | None:
    """The first sum behind tensor `y` of two tensors of one shape that every way to the graph's end leads through."""
    nodes = wiring.graph.nodes
    first = wiring.order[id(wiring.made_by[y])]
    unread = {t.name: len(t.outputs) for t in wiring.made_by[y].outputs}  # of what depends on y
    seen = set(unread)
    for node in nodes[first + 1 :]:
        read = [t.name for t in node.inputs if isinstance(t, gs.Variable)]
        if seen.isdisjoint(read):
            continue
        apart = [name for name in read if name not in seen]
        for name in read:
            if name in unread:
                unread[name] -= 1
        unread = {name: count for name, count in unread.items() if count > 0}
        unread |= {t.name: len(t.outputs) for t in node.outputs if t.outputs}
        seen |= {t.name for t in node.outputs}
        left, right = node.inputs[0], node.inputs[-1]
        if (
            node.op == "Add"
            and len(apart) == 1
            and list(unread) == [node.outputs[0].name]
            and left.shape == right.shape
        ):
            return Stream(node.outputs[0].name, frozenset(seen))
    return None


def share(layer: TwinLinear, stream: Stream, error: Array, values: Mapping[str, Array], wiring: Wiring) -> float:
    """What `error` in the layer's output, [..., N], makes of the stream: mean over tokens of |change|^2 / |stream|^2.

    values   of the float model, for the same tokens: all that the way from the output to the stream reads
    """
    known = {name: value for name, value in values.items() if name not in stream.between}
    feeds = known | {layer.y: values[layer.y] + error.reshape(values[layer.y].shape)}
    before, after = values[stream.name], Evaluation(wiring.graph, feeds, wiring=wiring).take(stream.name)
    change, size = (np.square(t, dtype=np.float64).sum(-1) for t in (after - before, before))
    return float((change / np.maximum(size, TINY)).mean())


def weigh(shares: Mapping[str, float], measure: Callable[[set[str]], float]) -> dict[str, float]:
    """Layer -> the KL in nats that it costs: its share, times the factor that its kind was measured to have.

    measure   the KL that these layers cause together
    """
    kinds: dict[str, set[str]] = {}
    for path in shares:
        kinds.setdefault(kind_of(path), set()).add(path)
    if len(kinds) > KINDS:
        return dict(shares)
    factors = {kind: measure(paths) / max(sum(shares[p] for p in paths), TINY) for kind, paths in kinds.items()}
    return {path: factors[kind_of(path)] * each for path, each in shares.items()}
