"""Why an answer is beyond its bound: the first layer that is wrong, or rounding that the model itself amplifies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bisect import AS_ROUGH, BisectingLog, Culprit, bisect
from instantrt.compiler.accuracy.layer_errors import layers_of
from instantrt.compiler.accuracy.subjects import all_positions
from instantrt.compiler.frontend import onnx_file
from instantrt.compiler.smoke.ask import Heard
from instantrt.compiler.smoke.compare import Distance, distances
from instantrt.compiler.smoke.lockstep import first_not_finite, lockstep
from instantrt.compiler.smoke.names import PRESENT, past
from instantrt.compiler.smoke.process import Answers
from instantrt.compiler.smoke.steps import CHANGED, Call, alone, typed
from instantrt.compiler.smoke.subject import Staged
from instantrt.passes.core.lazy import Array

COARSE = 0.25  # of an output, in size or in values that are others: beyond it 16 bits are no rounding of the model
VISIBLE = 1e-2  # a part of its largest value by which a token moves that sees another one; beyond any rounding


def why_wrong(subject: Staged, wrong: Sequence[Distance], expected: Answers, heard: Heard) -> str:
    """What is wrong, in words; "" where no layer is, and all that is beyond its bound is amplified rounding."""
    graph = onnx_file.artifact_graph(subject.file) if subject.on_cpu else subject.graph
    first, steps = wrong[0], heard.steps
    layer = wrong_layer(subject.twin.graph, wrong, heard.tapped)
    step = next((s for s in steps if s.name == alone(first.step)[0]), steps[0])
    try:
        culprit, excused = culprit_of(subject, graph, {**step.feeds, **past(expected.get(step.after, {}))})
        if math.isnan(first.relative) and (culprit is not None or not excused):
            bad = first_not_finite(graph, [typed(step, graph) for step in steps])
            return f"the first tensor that is not finite is {bad}"
        if culprit is not None:
            return f"{layer or layer_of(subject.twin.graph, culprit)}: {culprit}"
        if excused:
            return too_coarse(subject.dtype) if any(d.share > COARSE for d in wrong) else ""
        rough = roughness(graph, expected, steps, heard.tapped)
    except Exception as error:  # branches and loops, say: what cannot be looked into is wrong as it is
        return f"no layer can be named: {error}"
    if all(d.relative <= AS_ROUGH * rough.get((alone(d.step)[0], d.output), 0.0) for d in wrong):
        return ""
    return f"the layer {layer}" if layer else "no single layer is wrong"


def culprit_of(subject: Staged, graph: gs.Graph, feeds: Mapping[str, Array]) -> tuple[Culprit | None, bool]:
    """The first pass and node that is wrong on `feeds`, and whether rounding excuses others; `graph` is the result."""
    subject.say(f"{subject.target.name} is beyond its bound; looking for what is wrong")
    log = BisectingLog(canonical=subject.twin.graph, feeds=feeds, dtype=subject.dtype, say=subject.say, worst=False)
    if subject.request.embeddings == "int8" and not subject.on_cpu:  # what is rounded last is so in the reference
        found = next(log.wrong("writing the artifact", graph), None)
    else:
        found = bisect(partial(all_positions, subject.planned, subject.request, subject.target), log, graph)
    return found, bool(log.excused)


def too_coarse(dtype: np.dtype[np.generic]) -> str:
    return f"no layer is wrong: {dtype} is too coarse for this model, which amplifies its rounding"


def wrong_layer(twin: gs.Graph, wrong: Sequence[Distance], tapped: Answers) -> str:
    """The linear layers that the first wrong tensor comes from, and no right one does; "" without taps."""
    step = wrong[0].step
    bad, given = {d.output for d in wrong if d.step == step}, tapped.get(step, {})
    layers = {layer.y: layer.path for layer in layers_of(None, twin)}
    ends = set(given) - {t.name for t in twin.outputs}
    behind: dict[str, frozenset[str]] = {}  # the layers that a tensor comes from, back to what the artifact gave
    for node in twin.nodes:
        read = [behind.get(t.name, frozenset()) for t in node.inputs if t.name not in ends]
        own = {layers[t.name] for t in node.outputs if t.name in layers}
        behind |= dict.fromkeys((t.name for t in node.outputs), frozenset(own).union(*read))
    right = {path for name in given if name not in bad for path in behind.get(name, ())}
    first = next((name for name in behind if name in bad & set(given)), "")
    return " or ".join(path for path in layers.values() if path in behind.get(first, frozenset()) - right)


def layer_of(twin: gs.Graph, culprit: Culprit) -> str:
    """The linear layer that the wrong tensor is of, or is read by."""
    outputs = {t.name: index for index, node in enumerate(twin.nodes) for t in node.outputs}
    at = outputs.get(culprit.tensor, 0)
    layers = layers_of(None, twin)
    return next((layer.path for layer in layers if outputs[layer.y] >= at), layers[-1].path if layers else "-")


def roughness(
    graph: gs.Graph, expected: Answers, steps: Sequence[Call], given: Answers | None = None
) -> dict[tuple[str, str], float]:
    """(step, output) -> how far it is from what is expected where the nodes of `graph` are run one by one."""
    found = lockstep(graph, [typed(step, graph) for step in steps], given=given)
    known = {name: outputs for name, outputs in found.items() if name in expected}
    return {(d.step, d.output): d.relative for d in distances(known, expected, steps)}


def causality(found: Answers, expected: Answers) -> str:
    """Whether the first token sees the last one, where the two disagree about it."""
    sees, should = moved(found), moved(expected)
    if sees is None or should is None or sees == should:
        return ""
    words = ("does not see the last one", "sees the last one")
    return f"causality: the model's first token {words[should]}, the artifact's {words[sees]}"


def moved(answers: Answers) -> bool | None:
    """Does the first token see the last one? Seen in what the last layer's cache keeps of it; None without a cache."""
    caches = [name for name in answers.get("prefill", {}) if name.startswith(PRESENT)]
    if not caches or CHANGED not in answers:
        return None
    before, after = (answers[step][caches[-1]][:, :, 0].astype(np.float32) for step in ("prefill", CHANGED))
    return bool(np.abs(after - before).max() > VISIBLE * np.abs(before).max())
