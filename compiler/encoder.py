"""An encoder's artifact in this process: `Embedder` makes vectors of texts, `Classifier` labels.

with Embedder("build") as model:
    vectors = model.encode(["How are you?", "Fine."])
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, overload

import numpy as np
import numpy.typing as npt

from instantrt.compiler.artifact.check import inside
from instantrt.compiler.artifact.manifest import find_artifact
from instantrt.compiler.here import runs_on_cpu
from instantrt.compiler.kinds import check_kind
from instantrt.compiler.llm import check_threads, checked
from instantrt.compiler.serving.runtime.onnx_engine import open_session
from instantrt.compiler.serving.runtime.texts import TextReader, Texts, answered, best_labels, scoring
from instantrt.passes.core.errors import FOUND, UserError, tried

Array = npt.NDArray[np.float32]
BATCH = 32
WHERE = {  # task -> who runs it
    "embed": "Embedder, or instantrt embed",
    "classify": "Classifier, or instantrt classify",
    "classify_tokens": "load_artifact, which returns its logits",
    "fill_mask": "load_artifact, which returns its logits",
    "hidden": "load_artifact: nothing says how its hidden states become one vector; modules.json of "
    "sentence-transformers would",
    "": "LLM, or instantrt generate",
}
CALLED = {
    "embed": "a model of sentence embeddings",
    "classify": "a classifier of texts",
    "classify_tokens": "a classifier of tokens",
    "fill_mask": "a masked language model",
    "hidden": "a model that delivers hidden states",
    "": "a causal language model",
}


def listed(texts: str | Texts) -> list[str | tuple[str, str]]:
    """A text alone, or each of several; UserError for what is none."""
    several = isinstance(texts, Iterable) and not isinstance(texts, str | bytes | Mapping)
    many: list[Any] = list(texts) if several else [texts]
    for each in many:
        pair = isinstance(each, tuple | list) and len(each) == 2 and all(isinstance(part, str) for part in each)
        if not isinstance(each, str) and not pair:
            expected = "a str, or a list of them; a tuple of two where a model reads pairs"
            raise UserError("this is no text", expected=expected, found=repr(each)[:FOUND])
    return many


class OpenEncoder:
    """An artifact for this CPU that reads texts; its methods may be called from many threads.

    target            which artifact; else the only one that this machine can run, `artifact` then
    threads, spinning   as in `LLM`
    """

    TASK: ClassVar[str]

    def __init__(
        self, folder: Path | str, target: str | None = None, *, threads: int = 0, spinning: bool | None = None
    ) -> None:
        check_threads(threads, spinning)
        out = Path(folder)
        self.artifact = find_artifact(out, target, runs_on_cpu)
        path, about = inside(out, self.artifact.path), self.artifact.encoder or {}
        if about.get("task", "") != self.TASK:
            other = about.get("task", "" if self.artifact.llm is not None else "hidden")
            what = f"this is no model for {type(self).__name__}"
            raise UserError(what, where=str(path), found=CALLED[other], fix=f"use {WHERE[other]}")
        if self.artifact.kind != "onnx":
            fix = "compile for a CPU target; Triton runs engines"
            raise UserError("texts are read on a CPU alone", where=str(path), found=self.artifact.kind, fix=fix)
        if not (path.parent / "tokenizer.json").is_file():
            raise UserError("no tokenizer for the text", where=str(path.parent), expected="tokenizer.json")
        self.folder, self.threads = path.parent, threads
        with tried("reading the tokenizer", where=str(path.parent), fix="copy it again from the model"):
            self.reader = TextReader(path.parent, about, [spec.name for spec in self.artifact.inputs])
        with checked(out, self.artifact) as libraries, tried("loading it into ONNX Runtime", where=str(path)):
            self.session: Any = open_session(path, threads, spinning, libraries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.session = None

    def answers(self, texts: Texts, batch_size: int, prompt: str = "") -> Iterator[tuple[list[int], Array]]:
        """(which texts, what the model says of them), a batch at a time, the longest first."""
        check_kind("batch_size", batch_size, int)
        if batch_size < 1:
            raise UserError("batch_size is no number of texts", expected="1 or more", found=str(batch_size))
        if self.session is None:
            raise UserError("the model was released", where=str(self.folder), fix=f"make another {type(self).__name__}")
        rows = self.reader.rows(texts, prompt)
        yield from answered(self.session, self.reader.batches(rows, batch_size), self.threads)


class Embedder(OpenEncoder):
    """Vectors of texts, by a model that was compiled from a sentence-transformers folder."""

    TASK = "embed"

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        assert self.artifact.encoder is not None
        return int(self.artifact.encoder["width"])

    def encode(self, texts: str | Sequence[str], *, batch_size: int = BATCH, prompt_name: str | None = None) -> Array:
        """float32 [n, width] in the order of `texts`; of a single text [width].

        batch_size    texts that run together, at most
        prompt_name   of the model's prompts; the one that it uses by itself if not given
        """
        many = listed(texts)
        vectors = np.zeros((len(many), self.width), np.float32)
        try:
            prompt = self.reader.prompt(prompt_name)
        except ValueError as error:
            raise UserError(str(error), where=str(self.folder)) from None
        for part, found in self.answers(many, batch_size, prompt):
            vectors[part] = found
        return vectors[0] if isinstance(texts, str) else vectors


class Classifier(OpenEncoder):
    """Labels of texts, or of pairs of them, with scores."""

    TASK = "classify"

    @overload
    def classify(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, texts: str, *, batch_size: int = BATCH
    ) -> dict[str, float]: ...
    @overload
    def classify(self, texts: Texts, *, batch_size: int = BATCH) -> list[dict[str, float]]: ...
    def classify(self, texts: str | Texts, *, batch_size: int = BATCH) -> dict[str, float] | list[dict[str, float]]:
        """Label -> score of each text, the best first: softmax; sigmoid of one label, or of labels that do not exclude
        one another; or the logit itself, where the model's config says so."""
        many = listed(texts)
        assert self.artifact.encoder is not None
        names = self.artifact.encoder["labels"]
        by, found = scoring(self.folder, names), [dict[str, float]() for _ in many]
        for part, logits in self.answers(many, batch_size):
            for index, labels, scores in zip(part, *best_labels(logits, names, by), strict=True):
                found[index] = dict(zip(labels, scores.tolist(), strict=True))
        return found[0] if isinstance(texts, str) else found
