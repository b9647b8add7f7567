"""What is compared: the forms of one model, what each is held against, and how each is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from polygraphy.backend.base import BaseRunner

from instantrt.compiler.accuracy.bounds import FLOAT32, Bound, bound_of
from instantrt.compiler.accuracy.engine_runner import EngineRunner
from instantrt.compiler.accuracy.ledger import layers_of
from instantrt.compiler.accuracy.runners import GraphRunner, LastLogitsRunner, OnnxRunner, TransformersRunner, session
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend.model import FloatModel
from instantrt.passes.core.errors import UserError

# form -> (what it is held against, the kind of difference that is)
AGAINST = {
    "transformers": ("float", "export"),
    "twin": ("float", "quantization"),
    "artifact": ("twin", "lowering"),
    "lowered": ("twin", "lowering"),
    "engine": ("twin", "lowering"),
}
TWIN_BYTES = 1 << 30  # float32 weights that ONNX Runtime may hold; a larger twin streams
EXPORT = replace(FLOAT32, name="float32 export", model=1e-3)


@dataclass(frozen=True)
class Subject:
    """One model for one target. `floating` is None where the checkpoint itself is quantized; `file` is the artifact.

    `dtype` is what the lowered graph computes in; `about` says for a reader what was asked for; `logits` says which the
    file delivers, the last or all. The graphs have all.
    """

    model: FloatModel
    target: str
    about: Mapping[str, str]
    floating: gs.Graph | None
    canonical: gs.Graph
    lowered: gs.Graph
    dtype: np.dtype[np.generic]
    file: Path | None = None
    logits: str = "all"
    plugins: tuple[Path, ...] = ()

    @property
    def outputs(self) -> list[str]:
        """What is compared: logits, or everything that a model without them delivers."""
        return ["logits"] if self.model.llm is not None else [t.name for t in self.canonical.outputs]

    def default_forms(self) -> tuple[str, ...]:
        run = "artifact" if self.file is not None and self.file.suffix == ".onnx" else "lowered"
        return ("twin", run) if self.floating is None else ("float", "twin", run)


@dataclass(frozen=True)
class Limits:
    """What the user allows quantization to cost."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None  # percent

    def violations(self, figures: Mapping[str, float]) -> list[str]:
        increase = 100 * (figures["perplexity_ratio"] - 1)
        stated = (("KL", figures["kl_mean"], self.max_kl), ("perplexity increase, %,", increase, self.max_ppl_increase))
        return [
            f"{what} {value:.4g} exceeds the bound {limit:g}"
            for what, value, limit in stated
            if limit is not None and not value <= limit
        ]


UNLIMITED = Limits()


def model_bound(subject: Subject, kind: str) -> Bound | None:
    if kind == "quantization":
        return None
    return EXPORT if kind == "export" else bound_of(subject.lowered.nodes, subject.dtype)


def twin_runner(subject: Subject, scratch: Path) -> BaseRunner:
    """ONNX Runtime, which holds the twin's weights as float32; a model too large for that streams."""
    if 4 * sum(math.prod(layer.shape) for layer in layers_of(None, subject.canonical)) > TWIN_BYTES:
        return GraphRunner(subject.canonical, subject.outputs, "twin")
    write_model(subject.canonical.copy(), scratch / "twin.onnx")
    return OnnxRunner(session(scratch / "twin.onnx", as_written=True), subject.outputs, "twin")


def existing(subject: Subject, suffix: str) -> Path:
    if subject.file is None or subject.file.suffix != suffix:
        raise UserError(
            f"target {subject.target} has no {suffix} file to run",
            found=str(subject.file) if subject.file is not None else "nothing",
            fix="--forms float,twin,lowered checks the lowered graph on this CPU",
        )
    return subject.file


def artifact_runner(subject: Subject, scratch: Path) -> BaseRunner:  # noqa: ARG001  (as its neighbours)
    kind = LastLogitsRunner if subject.logits == "last" else OnnxRunner
    return kind(session(existing(subject, ".onnx")), subject.outputs, "artifact")


RUNNERS: dict[str, Callable[[Subject, Path], BaseRunner]] = {
    "float": lambda s, scratch: GraphRunner(s.floating, s.outputs, "float"),
    "transformers": lambda s, scratch: TransformersRunner(s.model.folder, "transformers"),
    "twin": twin_runner,
    "artifact": artifact_runner,
    "lowered": lambda s, scratch: GraphRunner(s.lowered, s.outputs, "lowered"),
    "engine": lambda s, scratch: EngineRunner(existing(s, ".engine"), s.plugins, s.outputs, "engine"),
}
