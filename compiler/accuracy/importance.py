"""How large the inputs of each linear are, which says what an error of its weights costs; and searches that use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler import pipeline
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.frontend.model import LlmShape
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation, Wiring
from instantrt.passes.core.lazy import FLOAT32, Array
from instantrt.passes.core.quant import InstantQuant, Quantizer, QuantTensor
from instantrt.passes.core.search import SearchedQuant
from instantrt.passes.qdq.insert_qdq import Decisions


def input_energy(graph: gs.Graph, llm: LlmShape | None, data: Data) -> dict[str, Array]:
    """Path -> E[x_k^2] over all rows of the data: float32 [K]. The float model runs once, a node at a time.

    UserError for a layer whose inputs it says nothing of.
    """
    inputs = {found.path: found.x.name for found in pipeline.linears(graph)}
    wiring, sums, rows = Wiring(graph), dict[str, Array](), dict[str, int]()
    for feeds, _ in data.each(llm):
        run = Evaluation(graph, feeds, wiring=wiring)
        for name in dict.fromkeys(inputs.values()):  # in the order of the graph: what was seen is dropped
            x = run.take(name)
            x = x.reshape(-1, x.shape[-1]).astype(np.float64)
            sums[name] = sums.get(name, 0) + np.einsum("mk,mk->k", x, x)
            rows[name] = rows.get(name, 0) + len(x)
    with np.errstate(over="ignore"):
        energy = {path: (sums[name] / max(rows[name], 1)).astype(FLOAT32) for path, name in inputs.items()}
    for path, each in energy.items():
        if not np.isfinite(each).all():
            what = "what reaches this layer is not finite, or its square is not"
            raise UserError(what, where=path, fix="look at the checkpoint's weights; --search none does without")
    return energy


def search_scales(decisions: Decisions, energy: Mapping[str, Array]) -> Decisions:
    """Every weight that we quantize with its scales searched for inputs of that energy."""
    return {
        path: replace(q, source=searched(q.source, energy[path]))
        if isinstance(q, QuantTensor) and isinstance(q.source, Quantizer)
        else q
        for path, q in decisions.items()
    }


def searched(source: Quantizer, energy: Array) -> SearchedQuant:
    about = {f.name: getattr(source, f.name) for f in fields(InstantQuant)}
    return SearchedQuant(**about, importance=energy.tobytes())
