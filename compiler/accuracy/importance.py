"""How large the inputs of each linear are, which says what an error of its weights costs; and searches that use it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, fields, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.frontend.model import LlmShape
from instantrt.compiler.say import At, Say
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.lazy import FLOAT32, Array, convert
from instantrt.passes.core.linear import NORMS
from instantrt.passes.core.quant import InstantQuant, Quantizer, QuantTensor
from instantrt.passes.core.search import SearchedQuant
from instantrt.passes.float.smooth_products import factor_of
from instantrt.passes.qdq.insert_qdq import Decisions

SILENT = 1e-5  # of a largest value: what is below it counts as that much
REMEMBERED = 1 << 26  # bytes of scales that a search may leave in memory: those of 700 M weights in groups of 32


def input_energy(graph: gs.Graph, llm: LlmShape | None, data: Data, say: Say = lambda text: None) -> dict[str, Array]:
    """Path -> E[x_k^2] over all rows of the data: float32 [K]. The float model runs once, a node at a time.

    UserError for a layer whose inputs it says nothing of.
    """
    inputs = {found.path: found.x.name for found in pipeline.linears(graph)}
    sums, rows = dict[str, Array](), dict[str, int]()
    for name, x in each_input(graph, inputs.values(), llm, data, say):
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


@dataclass(frozen=True)
class Smoothing:
    """How what one kind of operator gives is smoothed: see `smoothing`.

    share   of a channel's loudness that goes into its column
    most    of the expected error that may be left, for it to be done at all
    """

    share: float
    most: float


# Random tokens say of norms what texts say, of gated products only where they find far louder channels than there are
# in texts (docs/facts.md, "Loud inputs of a causal LM").
OF_NORMS, OF_PRODUCTS = Smoothing(0.75, 0.9), Smoothing(0.5, 0.25)


def smoothing(
    graph: gs.Graph, paths: Set[str], llm: LlmShape | None, data: Data, say: Say = lambda text: None
) -> dict[str, Array]:
    """Name of what the linears at `paths` read -> factors [K] by which it may be divided, powers of two.

    f_k is nearest to loud_k^share / column_k^(1 - share), times what makes their geometric mean 1: column_k is the
    largest weight that x_k meets; loud_k is of the first rows of the data, behind a norm the largest |x_k|, of a gated
    product the root of E[x_k^2]. No entry where nothing before it can be divided, or little would be won.
    """
    kinds, columns, squares = dict[str, Smoothing](), dict[str, Array](), dict[str, Array]()
    for found in (found for found in pipeline.linears(graph) if found.path in paths):
        name, normed = found.x.name, bool(found.x.inputs) and found.x.inputs[0].op in NORMS
        if not normed and factor_of(found.x) is None:
            continue
        kinds[name] = OF_NORMS if normed else OF_PRODUCTS
        for tile in found.rows.tiles():
            w = convert(tile.parts[0], FLOAT32)
            columns[name] = np.maximum(columns.get(name, 0), np.abs(w).max(axis=0))
            squares[name] = squares.get(name, 0) + np.einsum("nk,nk->k", w, w)
    factors = dict[str, Array]()
    for name, x in each_input(graph, kinds, llm, data, say):
        if name not in factors:
            loud = np.abs(x).max(axis=0, initial=0) if kinds[name] is OF_NORMS else np.sqrt(np.square(x).mean(axis=0))
            factors[name] = shared(loud, columns[name], kinds[name].share)
            if not expected(x, squares[name], factors[name]) <= kinds[name].most * expected(x, squares[name]):
                factors[name] = np.ones_like(loud)
    return {name: each for name, each in factors.items() if (each != 1).any()}


def expected(x: Array, squares: Array, factors: Array | float = 1) -> float:
    """What the rounding of x [M, K] / factors makes of outputs: the square of a token's step by that of its columns."""
    steps = np.abs(x / factors).max(axis=1, initial=0)
    return float(np.square(steps).mean() * (squares * np.square(factors)).sum())


def shared(loud: Array, columns: Array, share: float) -> Array:
    """The factors of channels [K] float32; 1 where all of either is zero, or something is not finite."""
    louds, larges = (np.maximum(each, SILENT * each.max(initial=0)) for each in (loud, columns))
    if not (louds.all() and larges.all() and np.isfinite(louds).all()):
        return np.ones_like(loud)
    powers: Array = share * np.log2(louds) - (1 - share) * np.log2(larges)
    factors: Array = np.exp2(np.rint(powers - powers.mean()))
    return factors.astype(FLOAT32)


def each_input(
    graph: gs.Graph, names: Iterable[str], llm: LlmShape | None, data: Data, say: Say = lambda text: None
) -> Iterator[tuple[str, Array]]:
    """(name, its rows [M, K]) of each tensor, for each batch of the data: the graph runs once, a node at a time."""
    wiring, once = Wiring(graph), dict.fromkeys(names)  # what was seen is dropped
    for feeds, _ in data.each(llm):
        run = Evaluation(graph, feeds, once, wiring)
        for done, name in enumerate(once):
            say(At(f"measuring the inputs of layers, {done} of {len(once)}"))
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
