"""Why an answer is beyond its bound: the first layer that is wrong, or rounding that the model itself amplifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bisect import AS_ROUGH, BisectingLog, Culprit, bisect
from instantrt.compiler.accuracy.layer_errors import layers_of
from instantrt.compiler.accuracy.subjects import all_positions
from instantrt.compiler.plan import Plan
from instantrt.compiler.request import Request
from instantrt.compiler.smoke.compare import PRESENT, Distance, distances
from instantrt.compiler.smoke.lockstep import lockstep
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.steps import PAST, Call, plain, typed
from instantrt.compiler.target import Target

COARSE = 0.25  # of an output, in size or in values that are others: beyond it 16 bits are no rounding of the model


@dataclass(frozen=True)
class Looker:
    """Looks into one artifact: `graph` is what it says, `reference` what it was lowered from.

    dtype   what it computes in
    """

    planned: Plan
    request: Request
    target: Target
    reference: gs.Graph
    graph: gs.Graph
    dtype: np.dtype[np.generic]

    def why(self, wrong: Sequence[Distance], expected: Answers, steps: Sequence[Call]) -> str:
        """What is wrong, in words; "" where no layer is, and all that is beyond its bound is amplified rounding."""
        first = wrong[0]
        step = next((s for s in steps if s.name == plain(first.step)), steps[0])
        try:
            culprit, excused = self.culprit(step, expected)
            if math.isnan(first.relative) and (culprit is not None or not excused):
                return f"the first tensor that is not finite is {lockstep(self.graph, self.typed(steps))[1]}"
            if culprit is not None:
                return f"{self.layer(culprit)}: {culprit}"
            if excused:
                return too_coarse(self.dtype) if any(d.share > COARSE for d in wrong) else ""
            rough = roughness(self.graph, expected, steps)
        except Exception as error:  # branches and loops, say: what cannot be looked into is wrong as it is
            return f"no layer can be named: {error}"
        if all(d.relative <= AS_ROUGH * rough.get((plain(d.step), d.output), 0.0) for d in wrong):
            return ""
        return "no single layer is wrong"

    def culprit(self, step: Call, expected: Answers) -> tuple[Culprit | None, bool]:
        """The first pass and node that is wrong, on the inputs of one step; whether rounding excuses others."""
        made = expected.get(step.after, {})
        cache = {PAST + name.removeprefix(PRESENT): v for name, v in made.items() if name.startswith(PRESENT)}
        log = BisectingLog(canonical=self.reference, feeds={**step.feeds, **cache}, dtype=self.dtype, worst=False)
        if self.request.embeddings == "int8":  # what is rounded last is rounded in the reference
            found = next(log.wrong("writing the artifact", self.graph), None)
        else:
            found = bisect(partial(all_positions, self.planned, self.request, self.target), log, self.graph)
        return found, bool(log.excused)

    def layer(self, culprit: Culprit) -> str:
        """The linear layer that the wrong tensor is of, or is read by."""
        outputs = {t.name: index for index, node in enumerate(self.reference.nodes) for t in node.outputs}
        at = outputs.get(culprit.tensor, 0)
        layers = layers_of(None, self.reference)
        return next((layer.path for layer in layers if outputs[layer.y] >= at), layers[-1].path if layers else "-")

    def typed(self, steps: Sequence[Call]) -> list[Call]:
        return [typed(step, self.graph) for step in steps]


def too_coarse(dtype: np.dtype[np.generic]) -> str:
    return f"no layer is wrong: {dtype} is too coarse for this model, which amplifies its rounding"


def roughness(graph: gs.Graph, expected: Answers, steps: Sequence[Call]) -> dict[tuple[str, str], float]:
    """(step, output) -> how far it is from what is expected where the nodes of `graph` are run one by one."""
    found, _ = lockstep(graph, [typed(step, graph) for step in steps])
    known = {name: outputs for name, outputs in found.items() if name in expected}
    return {(d.step, d.output): d.relative for d in distances(known, expected, steps)}
