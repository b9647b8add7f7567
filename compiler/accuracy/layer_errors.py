"""For every linear layer: what its weights lost, what that does to its output, and how well it was lowered.

The float model, the twin and the lowered graph run side by side, a layer at a time, on the same tokens. Weights stream
and activations live only until their last use, so the model may be larger than memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bounds import Bound, bound_of, seen_by
from instantrt.compiler.accuracy.metrics import difference, element_error
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array, Missing, Source, convert
from instantrt.passes.core.linear import bias_behind, linear
from instantrt.passes.core.quant import Codes, InstantQuant, QuantTensor, dequantize
from instantrt.passes.float.scaled import ScaledColumns, ScaledRows
from instantrt.passes.qdq.insert_qdq import quantized
from instantrt.passes.qdq.join_linears import joined_of, outputs_of, parts_of

FUSED = 4  # operators after a linear that a fusion may swallow: bias, activation, gate
PROBES = 4  # one-hot inputs for each group of a weight
MAX_PROBES = 256
# A code is at most half a step from its weight, and half a step more where the rounded zero point shifts the range.
STEPS = 1.001
GAIN = 4e-3  # rounding is unbiased: over a whole layer the weights keep their size


@dataclass(frozen=True)
class TwinLinear:
    """A linear of the twin, MatMul and bias, from tensor `x` to tensor `y`: named alike in every form of the graph."""

    path: str
    x: str
    y: str
    shape: tuple[int, int]
    quant: QuantTensor | None
    rows: Source | None  # the float weight, where there is one


@dataclass(frozen=True)
class LayerError:
    """One layer. Errors are relative L2 unless said otherwise; None where there is nothing to measure against.

    weight     of the weights                       steps    the largest error of a weight, in steps of its scale; None
                                                             where inputs decide the codes: they may be far from it
    gain       size kept: <quantized, w> / <w, w>   added    output error with the float model's own input
    piled_up   output error with the twin's input: what all layers so far have caused together
    lowering   worst output channel of the lowered layer against the twin's on the same input
    probe      worst element of the lowered layer's weights against the twin's
    """

    layer: str
    quant: str
    bytes_before: int
    bytes_after: int
    weight: float | None = None
    steps: float | None = None
    gain: float | None = None
    added: float | None = None
    piled_up: float | None = None
    lowering: float | None = None
    probe: float | None = None
    arithmetic: str = ""
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerErrors:
    rows: tuple[LayerError, ...]
    first_bad: Mapping[str, str]  # form of the model -> its first tensor that is not finite

    @property
    def findings(self) -> list[str]:
        bad = [f"{form}: tensor {name} is not finite" for form, name in self.first_bad.items()]
        return bad + [f"{row.layer}: {finding}" for row in self.rows for finding in row.findings]


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """The graphs of one model: the twin, what it came from, and what became of it, which computes in `dtype`.

    Without `floating` (a checkpoint that is quantized already) only the lowering is measured.
    """

    canonical: gs.Graph
    floating: gs.Graph | None = None
    lowered: gs.Graph | None = None
    dtype: np.dtype[np.generic] = np.dtype(np.float32)  # noqa: RUF009  (immutable)


def layers_of(floating: gs.Graph | None, canonical: gs.Graph) -> list[TwinLinear]:
    """The linears of the twin, in its order; `floating` has the weights that they came from."""
    sources = {}
    for node in floating.nodes if floating is not None else ():
        if (found := linear(node)) is not None and not isinstance(found.rows, Missing):
            sources[node.name] = found.rows
    layers = []
    quant: QuantTensor | None
    for node in canonical.nodes:
        if (q := quantized(node)) is not None:
            path, x, shape, quant = q.path, q.x.name, q.quant.shape, q.quant
        elif (plain := linear(node)) is not None:
            path, x, shape, quant = plain.path, plain.x.name, plain.shape, None
        else:
            continue
        last, _ = bias_behind(node, shape[0]) or (node, 0)
        layers.append(TwinLinear(path, x, last.outputs[0].name, shape, quant, sources.get(node.name)))
    return layers


class Run:
    """An evaluation that keeps every layer's input and output until the last layer that needs it is done."""

    def __init__(self, graph: gs.Graph, feeds: Mapping[str, Array], layers: list[TwinLinear]) -> None:
        self.uses = Counter(name for layer in layers for name in (layer.x, layer.y))
        self.evaluation = Evaluation(graph, feeds, keep=self.uses)

    def value(self, name: str) -> Array:
        self.uses[name] -= 1
        return self.evaluation.take(name) if not self.uses[name] else self.evaluation.peek(name)


def measure_layers(graphs: Graphs, feeds: Mapping[str, Array]) -> LayerErrors:
    """One row a linear, on one batch."""
    layers = layers_of(graphs.floating, graphs.canonical)
    twin = Run(graphs.canonical, feeds, layers)
    reference = Run(graphs.floating, feeds, layers) if graphs.floating is not None else None
    rows = tuple(measure(layer, graphs, twin, reference) for layer in layers)
    runs = {"twin": twin} | ({"float": reference} if reference is not None else {})
    return LayerErrors(rows, {form: run.evaluation.first_bad for form, run in runs.items() if run.evaluation.first_bad})


def measure(layer: TwinLinear, graphs: Graphs, twin: Run, reference: Run | None) -> LayerError:
    x, y = twin.value(layer.x), twin.value(layer.y)
    added = piled_up = weight = steps = gain = None
    if reference is not None:
        x_float, y_float = reference.value(layer.x), reference.value(layer.y)
        piled_up, added = difference(y, y_float).relative_l2, 0.0
        if layer.quant is not None:
            added = difference(between(graphs.canonical, layer, x_float), y_float).relative_l2
    if layer.quant is not None and layer.rows is not None:
        weight, steps, gain = weight_errors(layer.quant, layer.rows)
    check = None
    if graphs.lowered is not None:
        check = check_lowering(layer, graphs.canonical, graphs.lowered, graphs.dtype, x, y)
    stored = bytes_stored(layer.shape, layer.rows)
    return LayerError(
        layer=layer.path,
        quant=str(layer.quant) if layer.quant is not None else "float",
        bytes_before=stored,
        bytes_after=quantized_bytes(layer.quant) if layer.quant is not None else stored,
        weight=weight,
        steps=steps if layer.quant is not None and isinstance(layer.quant.source, InstantQuant) else None,
        gain=gain,
        added=added,
        piled_up=piled_up,
        lowering=check.lowering if check else None,
        probe=check.probe if check else None,
        arithmetic=check.bound.name if check else "",
        findings=(*weight_findings(layer, steps, gain), *(check.findings() if check else ())),
    )


def between(graph: gs.Graph, layer: TwinLinear, x: Array) -> Array:
    """What `graph` makes of `x` between the layer's input and its output."""
    return Evaluation(graph, {layer.x: x}).take(layer.y)


def bytes_stored(shape: tuple[int, ...], weight: Source | None) -> int:
    """Of a weight in the checkpoint, whatever is folded into it; in 16 bits where nothing says how it is stored."""
    while isinstance(weight, ScaledColumns | ScaledRows):
        weight = weight.rows
    return math.prod(shape) * int(getattr(weight, "dtype", np.dtype(np.float16)).itemsize)


def quantized_bytes(quant: QuantTensor) -> int:
    """Codes, scales and zero points, as they are stored."""
    n, k = quant.shape
    zero_bits = 8 * quant.zero_dtype.itemsize if quant.has_minima else 0 if quant.symmetric else quant.bits
    return n * k * quant.bits // 8 + n * quant.groups * (8 * quant.scale_dtype.itemsize + zero_bits) // 8


def weight_errors(quant: QuantTensor, rows: Source) -> tuple[float, float, float]:
    """(relative L2, largest error in steps, gain) of a weight, tile by tile in float64."""
    off = size = kept = steps = 0.0
    for w, codes in aligned(rows, quant):
        wide = w.astype(np.float64)
        got = dequantize(codes, quant.group_size).astype(np.float64)
        delta = got - wide
        off += float((delta * delta).sum())
        size += float((wide * wide).sum())
        kept += float((got * wide).sum())
        in_steps = np.abs(delta).reshape(*codes.scale.shape, -1) / codes.scale[..., None]
        steps = max(steps, float(in_steps.max()))
    size = max(size, np.finfo(np.float64).tiny)
    return float(np.sqrt(off / size)), steps, kept / size


def aligned(rows: Source, quant: QuantTensor) -> Iterator[tuple[Array, Codes]]:
    """The same rows of a float weight and of its quantized form, whatever tiles each comes in."""
    floats = ((convert(t.parts[0], np.dtype(np.float32)), t.start) for t in rows.tiles())
    w, start = next(floats)
    for tile in quant.tiles():
        codes, at = Codes(*tile.parts), tile.start
        while len(codes.codes):
            while at >= start + len(w):
                w, start = next(floats)
            count = min(len(codes.codes), start + len(w) - at)
            yield w[at - start : at - start + count], Codes(*(part[:count] for part in codes))
            codes, at = Codes(*(part[count:] for part in codes)), at + count


def weight_findings(layer: TwinLinear, steps: float | None, gain: float | None) -> list[str]:
    """InstantQuant's weights must be what rounding makes of the float ones; a search or a text changes their size."""
    if layer.quant is None or steps is None or gain is None or not isinstance(layer.quant.source, InstantQuant):
        return []
    found = []
    explained = explained_steps(layer.quant)
    if steps > explained:
        found.append(f"a weight is {steps:.3g} steps off, rounding explains at most {explained:.3g}")
    if abs(gain - 1) > GAIN:
        found.append(f"the weights' size changed by {gain - 1:+.2%}, rounding is unbiased")
    return found


def explained_steps(quant: QuantTensor) -> float:
    """What rounding explains, in steps of the scale: one that was rounded down in its type also cuts off the range."""
    levels, eps = 2**quant.bits - 1, float(ml_dtypes.finfo(quant.scale_dtype).eps)
    return float(STEPS + levels * eps / 2)


@dataclass(frozen=True)
class Check:
    """A lowered layer against the twin's: `missing` says which of its tensors the lowered graph lacks."""

    bound: Bound
    lowering: float = 0.0
    probe: float = 0.0
    missing: str = ""

    def findings(self) -> list[str]:
        if self.missing:
            return [f"the lowered graph has no tensor {self.missing}"]
        measured = (("output", self.lowering, self.bound.layer), ("weights", self.probe, self.bound.probe))
        return [
            f"lowering error of the {what} {value:.2e}, {self.bound.name} explains {limit:.0e}"
            for what, value, limit in measured
            if not value <= limit
        ]


def check_lowering(
    layer: TwinLinear, canonical: gs.Graph, lowered: gs.Graph, dtype: np.dtype[np.generic], x: Array, y: Array
) -> Check:
    """Both on the same inputs: the twin's real one, and one-hot probes that show the weights through any layout."""
    run = Evaluation(lowered, beside(layer, canonical, x))
    columns = slice(None)
    point = there = meeting_point(layer, canonical, run)
    if point is None and (part := part_of_product(layer, canonical, run)) is not None:
        point, columns, there = *part, layer.y
    if point is None or there is None:
        return Check(bound_of((), dtype), missing=layer.y)
    nodes = run.needed(point)
    bound = bound_of(nodes, dtype)
    seen = seen_by(nodes, x)
    expected = (
        y if seen is x and there == layer.y else Evaluation(canonical, beside(layer, canonical, seen)).take(there)
    )
    got = run.take(point)[..., columns]
    hot = beside(layer, canonical, probes(layer))
    found, wanted = Evaluation(lowered, hot).take(point)[..., columns], Evaluation(canonical, hot).take(there)
    largest = largest_weights(layer.quant) if layer.quant is not None and there == layer.y else 0.0
    return Check(bound, difference(got, expected).channel, element_error(found, wanted, bound.floor, largest))


def beside(layer: TwinLinear, canonical: gs.Graph, x: Array) -> dict[str, Array]:
    """The layer's input, with zeros for what is added to its output, bias or not: a product may do that itself."""
    feeds, made = {layer.x: x}, canonical.tensors()[layer.y]
    for _ in range(FUSED):
        sums = [node for node in made.outputs if node.op == "Add" and len(made.outputs) == 1]
        others = [t for node in sums for t in node.inputs if t is not made and isinstance(t, gs.Variable)]
        feeds |= {t.name: np.zeros((*x.shape[:-1], layer.shape[0]), x.dtype) for t in others}
        if not sums or others:
            break
        made = sums[0].outputs[0]
    return feeds


def largest_weights(quant: QuantTensor) -> Array:
    """The largest |weight| of each channel, float32 [N]: what is lost there is lost of that, met by a probe or not."""
    each = (np.abs(dequantize(Codes(*tile.parts), quant.group_size)).max(axis=1) for tile in quant.source.tiles())
    return np.concatenate(list(each))


def meeting_point(layer: TwinLinear, canonical: gs.Graph, run: Evaluation) -> str | None:
    """The layer's output; where a fusion swallowed it, the first tensor after it that both graphs make of x alone."""
    twin = Evaluation(canonical, dict(run.values))
    tensors = canonical.tensors()
    near = [tensors[layer.y]]
    for _ in range(FUSED):
        for tensor in near:
            try:
                if tensor.name in run.wiring.made_by and run.needed(tensor.name) and twin.needed(tensor.name):
                    return str(tensor.name)
            except KeyError:  # made of more than x
                continue
        near = [out for tensor in near for node in tensor.outputs for out in node.outputs]
    return None


def part_of_product(layer: TwinLinear, canonical: gs.Graph, run: Evaluation) -> tuple[str, slice] | None:
    """The output of a product that the layer was joined in, which is read as a whole, and the layer's columns of it."""
    name = next((n for n in map(joined_of, run.wiring.made_by) if n is not None and layer.path in parts_of(n)), None)
    if name is None:
        return None
    rows = {found.path: found.quant.shape[0] for node in canonical.nodes if (found := quantized(node)) is not None}
    paths = parts_of(name)
    first = sum(rows[path] for path in paths[: paths.index(layer.path)])
    point = next(tensor for tensor in outputs_of(name) if tensor in run.wiring.made_by)
    return point, slice(first, first + rows[layer.path])


def probes(layer: TwinLinear) -> Array:
    """One-hot inputs [1, P, K]: every group of the weight is met at several k, the same ones every time."""
    k = layer.shape[1]
    group = layer.quant.group_size if layer.quant is not None else k
    groups = k // group
    count = max(PROBES * groups, 16) if PROBES * groups <= MAX_PROBES else max(groups, MAX_PROBES)
    random = np.random.default_rng(k)
    at = (np.arange(count) % groups) * group + random.integers(0, group, count)
    hot = np.zeros((1, count, k), np.float32)
    hot[0, np.arange(count), at] = 1
    return hot
