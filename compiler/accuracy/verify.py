"""Runs the forms of one model on the same data and says how far each is from what it was made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from instantrt.compiler.accuracy.bounds import INT8_BFLOAT16, INT8_BLOCK, INT8_FLOAT16, INT8_TOKEN
from instantrt.compiler.accuracy.data import Data
from instantrt.compiler.accuracy.forms import AGAINST, FORMS, UNLIMITED, Budget, Subject, model_bound
from instantrt.compiler.accuracy.layer_errors import Graphs, LayerErrors, measure_layers
from instantrt.compiler.accuracy.metrics import Tokens, compare_tokens, log_softmax, next_nll, perplexity, summary
from instantrt.compiler.accuracy.runners import GraphRunner, Runner, cut, opened
from instantrt.compiler.accuracy.texts import answers, likeness
from instantrt.compiler.say import Say
from instantrt.passes.core.errors import UserError
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.lazy import Array

TURNING = (INT8_TOKEN, INT8_BLOCK, INT8_FLOAT16, INT8_BFLOAT16)  # where a last bit turns a code
AS_CLOSE = 1.1  # times as far from the float model as the twin
AS_FLOAT = "held against float"  # in place of the arithmetic whose rounding makes a bound


@dataclass(frozen=True)
class Comparison:
    """One form against its reference, over all data. `bound` is on relative_l2; None where the user sets no bound, and
    where it is `as_close`.

    as_close   it is as close to the float model as its twin is, which roundings that turned may well be far from: where
               activations of an encoder become int8, each that turns is a whole step, and layers amplify it; so may
               codes be that were fitted elsewhere
    """

    kind: str
    form: str
    reference: str
    relative_l2: float
    maximum: float
    bound: float | None
    arithmetic: str
    as_close: bool = False

    @property
    def holds(self) -> bool:
        return self.bound is None or self.relative_l2 <= self.bound


@dataclass(frozen=True)
class Verdict:
    """Everything a report shows."""

    target: str
    about: Mapping[str, str]  # model, request and data, for a reader
    data: Data
    comparisons: tuple[Comparison, ...]
    tokens: Tokens | None  # twin against float
    figures: Mapping[str, float]
    perplexities: Mapping[str, float]  # form -> perplexity; empty without a text
    layer_errors: LayerErrors
    violations: tuple[str, ...]
    command: str
    note: str = ""  # what was not looked at

    @property
    def passed(self) -> bool:
        return not self.violations


def verify(
    subject: Subject,
    data: Data,
    folder: Path,
    *,
    forms: Sequence[str] = (),
    budget: Budget = UNLIMITED,
    final: Callable[[Path], Path] = lambda path: path,
    say: Say = lambda text: None,
) -> Verdict:
    """Compares; leaves Polygraphy's files in `folder`, which exists. `final` says where a path will be."""
    from instantrt.compiler.accuracy.polygraphy_files import polygraphy_files

    forms = tuple(forms) or subject.default_forms()
    check_names(forms)
    check_forms(subject, forms)
    if "transformers" in forms:
        say("loading the float model with transformers")
    with opened(subject, forms) as runners:
        say("running " + ", ".join(runners))
        totals, to_float, tokens, nll, figures = compare(subject, data, runners)
        say("comparing with Polygraphy")
        comparisons = tuple(total.comparison(subject, to_float) for total in totals)
        held = [c.form for c in comparisons if not c.as_close]
        command, objections = polygraphy_files(subject, data, runners, folder, final, held)
        bad = first_bad(subject, runners, totals, data)
    say("measuring layer by layer")
    feeds, _ = next(data.each(subject.model.llm))
    without = Graphs(canonical=subject.canonical, floating=subject.floating, dtype=subject.dtype)
    layers = measure_layers(without if subject.refitted else subject, feeds)
    layers = replace(layers, first_bad={**bad, **layers.first_bad})
    unheld = [
        f"{c.kind} error of {c.form}: relative L2 {c.relative_l2:.2e}, {c.arithmetic} explains {c.bound:.0e}"
        for c in comparisons
        if not c.holds
    ]
    violations = (*layers.findings, *unheld, *objections, *(budget.violations(figures) if figures else ()))
    texts = {form: perplexity(np.concatenate(parts)) for form, parts in nll.items()} if data.kind != "generated" else {}
    note = not_looked_at(subject, forms)
    said = {**subject.about, "measured on": str(data)}
    return Verdict(subject.target, said, data, comparisons, tokens, figures, texts, layers, violations, command, note)


REFITTED = (
    "The artifact's codes were fitted on another processor, or by other threads, which round otherwise. They are held "
    "against the float model: they may be a tenth farther from that than those that are fitted here."
)


def not_looked_at(subject: Subject, forms: Sequence[str]) -> str:
    """What a reader might think was run, or compared, and was not."""
    if subject.refitted:
        return REFITTED
    if "engine" in forms or "lowered" not in forms or subject.reads_back:
        return ""
    if subject.file is None:
        return "There is no engine yet: what ran, on this CPU, is the lowered graph that it will be built from."
    return (
        "The engine itself was not run: what ran, on this CPU, is the lowered graph that it was built from. "
        "On a machine with its GPU, instantrt diff --forms twin,engine runs an engine from --logits all."
    )


def check_names(forms: Sequence[str]) -> None:
    """Refuses what no model has, and one form alone; none at all is the default."""
    unknown = [f for f in forms if f not in FORMS]
    if unknown:
        raise UserError("no such form of a model", expected=", ".join(FORMS), found=", ".join(unknown))
    if len(set(forms)) == 1:
        raise UserError("a comparison needs two forms", expected=", ".join(FORMS), found=", ".join(forms))


def check_forms(subject: Subject, forms: Sequence[str]) -> None:
    if subject.floating is None and {"float", "transformers"} & set(forms):
        raise UserError(
            "there is no float model to compare with: the checkpoint is quantized",
            where=str(subject.model.folder),
            fix="--forms twin,artifact",
        )
    if subject.refitted and "float" not in forms:
        raise UserError("codes that were fitted elsewhere are held against the float model", fix="--forms with float")
    if "transformers" in forms and not subject.model.config:
        raise UserError("an .onnx file has no transformers model", fix="leave the form transformers out")
    if "transformers" in forms and subject.model.encoder is not None and subject.model.encoder.task == "embed":
        what = "transformers runs no sentence embeddings: their modules follow the model that it has"
        raise UserError(what, where=str(subject.model.folder), fix="leave the form transformers out")


@dataclass
class Total:
    """Sums over batches of one form against its reference."""

    form: str
    squares: float = 0.0
    reference_squares: float = 0.0
    maximum: float = 0.0

    def add(self, outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        for name, value in outputs.items():
            for row, expected in zip(np.atleast_1d(value), np.atleast_1d(reference[name]), strict=True):
                if row.shape != expected.shape:
                    raise UserError(
                        "two forms of a model differ in shape",
                        where=name,
                        found=f"{list(row.shape)} and {list(expected.shape)}",
                        fix="name the model that the artifact was compiled from",
                    )
                wide = expected.astype(np.float64)
                delta = row.astype(np.float64) - wide
                self.squares += float((delta * delta).sum())
                self.reference_squares += float((wide * wide).sum())
                self.maximum = max(self.maximum, float(np.abs(delta).max(initial=0)))

    @property
    def error(self) -> float:
        return math.sqrt(self.squares / max(self.reference_squares, np.finfo(np.float64).tiny))

    def comparison(self, subject: Subject, to_float: Mapping[str, Total]) -> Comparison:
        """`to_float` are forms against the float model, of an encoder or where codes were fitted again."""
        reference, kind = AGAINST[self.form]
        bound = model_bound(subject, kind)
        limit, said = (bound.model, bound.name) if bound is not None else (None, "")
        turns = reference == "twin" and (bound in TURNING or subject.refitted) and {self.form, "twin"} <= {*to_float}
        close = turns and to_float[self.form].error <= AS_CLOSE * to_float["twin"].error
        limit, said = (None, AS_FLOAT) if close else (limit, said)
        return Comparison(kind, self.form, reference, self.error, self.maximum, limit, said, as_close=close)


class Compared(NamedTuple):
    """What one pass over the data finds; `figures` are of the twin against the float model."""

    totals: list[Total]
    to_float: dict[str, Total]  # every form, where they are held against the float model
    tokens: Tokens | None
    nll: dict[str, list[Array]]
    figures: dict[str, float]


def compare(subject: Subject, data: Data, runners: Mapping[str, Runner]) -> Compared:
    """One pass over the data: nothing but sums and a few numbers a token is kept."""
    totals = [Total(form) for form in runners if AGAINST.get(form, ("",))[0] in runners]
    tokens: list[Tokens] = []
    nll: dict[str, list[Array]] = {}
    rows: dict[str, list[Array]] = {}  # what an encoder says
    encoder = subject.model.encoder
    held = "float" in runners and (encoder is not None or subject.refitted)
    to_float = {form: Total(form) for form in runners if held}
    for feeds, ids in data.each(subject.model.llm):
        outputs = {form: run(feeds) for form, run in runners.items()}
        for total in totals:
            total.add(outputs[total.form], cut(outputs[AGAINST[total.form][0]], outputs[total.form]))
        for form, total in to_float.items():
            total.add(outputs[form], cut(outputs["float"], outputs[form]))
        if ids is None:
            if encoder is not None:
                for form in sorted({"float", "twin"} & outputs.keys()):
                    rows.setdefault(form, []).append(answers(outputs[form], feeds, encoder))
            continue
        if "float" in outputs and "twin" in outputs:
            tokens.append(compare_tokens(outputs["float"]["logits"], outputs["twin"]["logits"], ids))
        for form, out in outputs.items():
            if out["logits"].shape[1] == ids.shape[1]:
                each = zip(map(log_softmax, out["logits"]), ids, strict=True)
                nll.setdefault(form, []).extend(next_nll(log_p, row) for log_p, row in each)
    joined = Tokens.join(tokens) if tokens else None
    if encoder is not None and {"float", "twin"} <= rows.keys():
        figures = likeness(np.concatenate(rows["float"]), np.concatenate(rows["twin"]), encoder)
    else:
        figures = summary(joined) if joined is not None else {}
    return Compared(totals, to_float, joined, nll, figures)


def first_bad(subject: Subject, runners: Mapping[str, Runner], totals: Sequence[Total], data: Data) -> dict[str, str]:
    """The first tensor that is not finite, for each form that has one; an opaque form is looked into by evaluation."""
    found = {form: r.first_bad for form, r in runners.items() if isinstance(r, GraphRunner) and r.first_bad}
    graphs = {"twin": subject.canonical, "artifact": subject.lowered, "engine": subject.lowered}
    for total in totals:
        if math.isfinite(total.squares) or total.form in found or total.form not in graphs:
            continue
        for feeds, _ in data.each(subject.model.llm):
            run = Evaluation(graphs[total.form], feeds)
            run.take(subject.outputs[0])
            if run.first_bad:
                found[total.form] = run.first_bad
                break
    return found
