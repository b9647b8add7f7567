"""What is compared: the forms of one model, and what each is held against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_graphsurgeon as gs

from instantrt.compiler.accuracy.bounds import FLOAT32, Bound, bound_of
from instantrt.compiler.accuracy.layer_errors import Graphs
from instantrt.compiler.frontend.model import FloatModel

# form -> (what it is held against, the kind of difference that is)
AGAINST = {
    "transformers": ("float", "export"),
    "twin": ("float", "quantization"),
    "artifact": ("twin", "lowering"),
    "lowered": ("twin", "lowering"),
    "engine": ("twin", "lowering"),
}
FORMS = ("float", *AGAINST)
EXPORT = replace(FLOAT32, name="float32 export", model=1e-3)


@dataclass(frozen=True, kw_only=True)
class Subject(Graphs):
    """One model for one target; `file` is the artifact, `about` says for a reader what was asked for.

    `logits` says which the file delivers, the last or all; the graphs have all. `refitted`: the file has other codes
    than those that its inputs decide here, which the twin has, so that it is held against the float model.
    """

    model: FloatModel
    target: str
    about: Mapping[str, str]
    lowered: gs.Graph
    file: Path | None = None
    logits: str = "all"
    plugins: tuple[Path, ...] = ()
    refitted: bool = False

    @property
    def outputs(self) -> list[str]:
        """What is compared: logits, or everything that a model without them delivers."""
        return ["logits"] if self.model.llm is not None else [t.name for t in self.canonical.outputs]

    @property
    def reads_back(self) -> bool:
        """Is the artifact a graph, which `lowered` was read back from?"""
        return self.file is not None and self.file.suffix == ".onnx"

    def default_forms(self) -> tuple[str, ...]:
        run = "artifact" if self.reads_back else "lowered"
        return ("twin", run) if self.floating is None else ("float", "twin", run)


@dataclass(frozen=True)
class Budget:
    """What the user allows quantization to cost."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None  # percent
    min_cosine: float | None = None

    @property
    def bounded(self) -> bool:
        return self.max_kl is not None or self.max_ppl_increase is not None

    def violations(self, figures: Mapping[str, float]) -> list[str]:
        """What of the figures that there are is beyond its bound."""
        increase = 100 * (figures.get("perplexity_ratio", math.nan) - 1)
        stated = (
            ("KL", figures.get("kl_mean"), self.max_kl),
            ("perplexity increase, %,", increase, self.max_ppl_increase),
        )
        beyond = [
            f"{what} {value:.4g} exceeds the bound {limit:g}"
            for what, value, limit in stated
            if limit is not None and value is not None and not value <= limit
        ]
        cosine = figures.get("cosine_min", math.nan)
        if self.min_cosine is not None and not cosine >= self.min_cosine:
            beyond.append(f"the smallest cosine, {cosine:.5f}, is below the bound {self.min_cosine:g}")
        return beyond


UNLIMITED = Budget()


def model_bound(subject: Subject, kind: str) -> Bound | None:
    if kind == "quantization":
        return None
    return EXPORT if kind == "export" else bound_of(subject.lowered.nodes, subject.dtype)
