"""What a quantized weight changes in its outputs on average goes into the bias behind it.

Bias correction (Nagel et al., 2019, "Data-Free Quantization through Weight Equalization and Bias Correction"):
E[W x] - E[W^ x] of every output, which calibration measures.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from instantrt.passes.core.lazy import FLOAT32, Array, convert, small
from instantrt.passes.core.linear import bias_behind, linear
from instantrt.passes.core.quant import QuantTensor
from instantrt.passes.core.rewrite import Reject, Rewrite
from instantrt.passes.core.verify import activations_are_float
from instantrt.passes.qdq.insert_qdq import Decisions


@dataclass(frozen=True)
class BiasMatch:
    """The Add of a bias, which of its inputs that is, and what it gains."""

    path: str
    add: gs.Node
    index: int
    gain: Array


@dataclass(frozen=True)
class CorrectBiases(Rewrite[BiasMatch]):
    """Add(MatMul(x, W), b) -> Add(MatMul(x, W), b + correction) where W's quantization has a correction."""

    requires = (activations_are_float,)

    decisions: Decisions
    made: dict[str, gs.Constant] = field(default_factory=dict, repr=False, compare=False)  # in a run, by name

    def for_graph(self, graph: gs.Graph) -> CorrectBiases:  # noqa: ARG002
        return CorrectBiases(self.decisions)

    def match(self, node: gs.Node) -> BiasMatch | Reject | None:
        found = linear(node)
        decision = self.decisions.get(found.path) if found is not None else None
        if found is None or not isinstance(decision, QuantTensor) or not decision.correction:
            return None
        behind = bias_behind(node, found.shape[0])
        if behind is None:
            return Reject("no bias behind it that takes the correction")
        return BiasMatch(found.path, *behind, np.frombuffer(decision.correction, np.float32))

    def rewrite(self, graph: gs.Graph, match: BiasMatch) -> None:  # noqa: ARG002  (nothing is added to it)
        bias = match.add.inputs[match.index]
        name = f"{bias.name}/corrected/{match.path}"
        if name not in self.made:  # a module may be used several times
            self.made[name] = small(name, convert(bias.values, FLOAT32) + match.gain, np.float32)
        match.add.inputs[match.index] = self.made[name]

    def note(self, match: BiasMatch) -> str:
        return f"by up to {np.abs(match.gain).max():.2g}"
