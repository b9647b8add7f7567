"""How large the inputs of each linear are, which says what an error of its weights costs; and searches that use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import fields, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.frontend.model import LlmShape
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.lazy import FLOAT32, Array, convert
from instantrt.passes.core.quant import InstantQuant, Quantizer, QuantTensor
from instantrt.passes.core.search import SearchedQuant
from instantrt.passes.qdq.insert_qdq import Decisions

SHARE = 0.75  # of a channel's loudness that goes into its column
SILENT = 1e-5  # of a largest value: what is below it counts as that much
REMEMBERED = 1 << 26  # bytes of scales that a search may leave in memory: those of 700 M weights in groups of 32


def input_energy(graph: gs.Graph, llm: LlmShape | None, data: Data) -> dict[str, Array]:
    """Path -> E[x_k^2] over all rows of the data: float32 [K]. The float model runs once, a node at a time.

    UserError for a layer whose inputs it says nothing of.
    """
    inputs = {found.path: found.x.name for found in pipeline.linears(graph)}
    sums, rows = dict[str, Array](), dict[str, int]()
    for name, x in each_input(graph, inputs.values(), llm, data):
        wide = x.astype(np.float64)
        sums[name] = sums.get(name, 0) + np.einsum("mk,mk->k", wide, wide)
        rows[name] = rows.get(name, 0) + len(x)
    with np.errstate(over="ignore"):
        energy = {path: (sums[name] / max(rows[name], 1)).astype(FLOAT32) for path, name in inputs.items()}
    for path, each in energy.items():
        if not np.isfinite(each).all():
            what = "what reaches this layer is not finite, or its square is not"
            raise UserError(what, where=path, fix="look at the checkpoint's weights; --search none does without")
    return energy


def smoothing(graph: gs.Graph, paths: Set[str], data: Data) -> dict[str, Array]:
    """Name of what the linears at `paths` read -> factors [K] by which it may be divided, powers of two.

    f_k is nearest to peak_k^0.75 / column_k^0.25, times what makes their geometric mean 1: peak_k is the largest |x_k|
    over all rows of the data, column_k the largest weight that x_k meets. No entry where nothing would change.
    """
    columns, peaks = dict[str, Array](), dict[str, Array]()
    for found in (found for found in pipeline.linears(graph) if found.path in paths):
        for tile in found.rows.tiles():
            largest = np.abs(convert(tile.parts[0], FLOAT32)).max(axis=0)
            columns[found.x.name] = np.maximum(columns.get(found.x.name, 0), largest)
    for name, x in each_input(graph, columns, None, data):
        peaks[name] = np.maximum(peaks.get(name, 0), np.abs(x).max(axis=0, initial=0))
    factors = {name: shared(peaks[name], columns[name]) for name in columns}
    return {name: each for name, each in factors.items() if (each != 1).any()}


def shared(peaks: Array, columns: Array) -> Array:
    """The factors of channels [K] float32; 1 where all of either is zero, or something is not finite."""
    loud, large = (np.maximum(each, SILENT * each.max(initial=0)) for each in (peaks, columns))
    if not (loud.all() and large.all() and np.isfinite(loud).all()):
        return np.ones_like(peaks)
    powers: Array = SHARE * np.log2(loud) - (1 - SHARE) * np.log2(large)
    factors: Array = np.exp2(np.rint(powers - powers.mean()))
    return factors.astype(FLOAT32)


def each_input(graph: gs.Graph, names: Iterable[str], llm: LlmShape | None, data: Data) -> Iterator[tuple[str, Array]]:
    """(name, its rows [M, K]) of each tensor, for each batch of the data: the graph runs once, a node at a time."""
    wiring, once = Wiring(graph), dict.fromkeys(names)  # what was seen is dropped
    for feeds, _ in data.each(llm):
        run = Evaluation(graph, feeds, once, wiring)
        for name in once:
            x = run.take(name)
            yield name, x.reshape(-1, x.shape[-1])


def search_scales(decisions: Decisions, energy: Mapping[str, Array]) -> Decisions:
    """Every weight that we quantize with its scales searched for inputs of that energy.

    They are read twice, by the writer and by the twin of the smoke run: what is found stays where it takes little.
    """
    ours = {
        path: (q, q.source)
        for path, q in decisions.items()
        if isinstance(q, QuantTensor) and isinstance(q.source, Quantizer)
    }
    remember = sum(q.shape[0] * q.groups * (q.scale_dtype.itemsize + 1) for q, _ in ours.values()) <= REMEMBERED
    found = {p: replace(q, source=searched(source, energy[p], remember=remember)) for p, (q, source) in ours.items()}
    return {**decisions, **found}


def searched(source: Quantizer, energy: Array, *, remember: bool = False) -> SearchedQuant:
    about = {f.name: getattr(source, f.name) for f in fields(InstantQuant)}
    return SearchedQuant(**about, importance=energy.tobytes(), remember=remember)
