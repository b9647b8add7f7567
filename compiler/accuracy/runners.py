"""Every form of a model as a function of one batch: named inputs -> the outputs that are compared."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_graphsurgeon as gs
import onnxruntime as ort

from instantrt.compiler.accuracy.engine_runner import EngineRunner
from instantrt.compiler.accuracy.forms import Subject
from instantrt.compiler.accuracy.layer_errors import layers_of
from instantrt.compiler.artifact.positions import open_every_position
from instantrt.compiler.backend.onnx_writer import write_model
from instantrt.compiler.frontend.architecture import CAUSAL_LM, auto_class
from instantrt.compiler.frontend.gguf import refuse_gguf
from instantrt.compiler.frontend.model import EncoderShape
from instantrt.compiler.serving.runtime.onnx_engine import PAST, empty_cache
from instantrt.passes.core.errors import MissingExtra, UserError, require, tried
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.evaluate_node import numpy_type
from instantrt.passes.core.lazy import Array

Runner = Callable[[Mapping[str, Array]], dict[str, Array]]
TWIN_BYTES = 1 << 30  # float32 weights that ONNX Runtime may hold; a larger twin streams


@contextmanager
def opened(subject: Subject, forms: Sequence[str]) -> Iterator[dict[str, Runner]]:
    """A runner for each form; what it holds, the twin's file too, lives only inside."""
    with TemporaryDirectory(prefix="twin.") as folder, ExitStack() as stack:
        yield {form: open_form(subject, form, Path(folder), stack) for form in forms}


def open_form(subject: Subject, form: str, scratch: Path, stack: ExitStack) -> Runner:
    outputs = subject.outputs
    match form:
        case "float":
            return GraphRunner(subject.floating, outputs)
        case "lowered":
            return GraphRunner(subject.lowered, outputs)
        case "transformers":
            return transformers_runner(subject.model.folder, subject.model.adapter, subject.model.encoder)
        case "artifact":
            file = existing(subject, ".onnx")
            runner = last_logits_runner if subject.logits == "last" else onnx_runner
            return runner(file, outputs, libraries=subject.plugins)
        case "engine":
            return stack.enter_context(EngineRunner(existing(subject, ".engine"), subject.plugins, outputs))
    assert form == "twin"
    if 4 * sum(math.prod(layer.shape) for layer in layers_of(None, subject.canonical)) > TWIN_BYTES:
        return GraphRunner(subject.canonical, outputs)
    write_model(subject.canonical.copy(), scratch / "twin.onnx")
    return onnx_runner(scratch / "twin.onnx", outputs, as_written=True)


def existing(subject: Subject, suffix: str) -> Path:
    if subject.file is None or subject.file.suffix != suffix:
        raise UserError(
            f"target {subject.target} has no {suffix} file to run",
            found=str(subject.file) if subject.file is not None else "nothing",
            fix="--forms float,twin,lowered checks the lowered graph on this CPU",
        )
    return subject.file


class GraphRunner:
    """A graph of ours, evaluated node by node: weights stream, our operators run through their reference functions.

    `first_bad` is the first tensor of any batch so far that was not finite.
    """

    def __init__(self, graph: gs.Graph, outputs: Sequence[str]) -> None:
        self.graph, self.outputs = graph, outputs
        self.first_bad: str | None = None

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        types = {t.name: numpy_type(t.dtype) for t in self.graph.inputs}
        cast = {name: value.astype(types[name], copy=False) for name, value in feeds.items() if name in types}
        run = Evaluation(self.graph, cast, keep=self.outputs)
        outputs = {name: run.take(name) for name in self.outputs}
        self.first_bad = self.first_bad or run.first_bad
        return outputs


def transformers_runner(folder: Path, adapter: Path | None = None, encoder: EncoderShape | None = None) -> Runner:
    """The float checkpoint through transformers, in float32: a reference that shares nothing with our exporter.

    adapter   a LoRA, which peft runs beside the weights: nothing is merged
    encoder   the interface of a model that is no causal LM
    """
    require("hf", "running a float checkpoint")
    if adapter is not None and find_spec("peft") is None:
        raise MissingExtra("running a checkpoint with an adapter in transformers needs peft: pip install peft")
    refuse_gguf(folder)
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tried("loading the float model with transformers", where=str(folder)):
        auto = auto_class(encoder.task) if encoder is not None else CAUSAL_LM.auto
        model: Any = getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32).eval()
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter).eval()

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        names = encoder.input_names() if encoder is not None else ("input_ids", "attention_mask", "position_ids")
        given = {key: torch.tensor(feeds[key]) for key in names}
        with torch.inference_mode():
            if encoder is None:
                return {"logits": model(**given, use_cache=False).logits.numpy()}
            (output,) = encoder.output_names()
            return {output: model(**given)[output].numpy()}

    return run


def session(
    path: Path, *, as_written: bool = False, every_position: bool = False, libraries: Sequence[Path] = ()
) -> ort.InferenceSession:
    """An ONNX file in ONNX Runtime, on all of this process's cores; where asked, with the logits of every position.

    `libraries`: of operators of ours, which are code: who calls has checked them.

    `as_written`: for a twin, and for what was lowered for TensorRT, in float16 too. Else ONNX Runtime 1.32 makes of a
    dequantized weight and its MatMul a kernel that quantizes the activations, and with float16 scales gets the sums
    wrong; and at its highest level of optimization it crashes on some float16 graphs (docs/facts.md, "The twin's
    session options").
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if as_written:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tried("loading it into ONNX Runtime", where=str(path)):
        for library in libraries:
            options.register_custom_ops_library(str(library))
        if every_position:
            return open_every_position(path, options)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def onnx_runner(path: Path, outputs: Sequence[str], **how: Any) -> Runner:
    """Only what is compared is fetched: a cache is as large as the logits and says nothing more."""
    loaded = session(path, **how)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        cache = empty_cache(loaded, len(feeds["input_ids"]), 0) if f"{PAST}0.key" in feeds else {}
        given = {**feeds, **{PAST + part: nothing for part, nothing in cache.items()}}  # of the file's own types
        return dict(zip(outputs, loaded.run(list(outputs), given), strict=True))

    return run


def last_logits_runner(path: Path, outputs: Sequence[str], libraries: Sequence[Path]) -> Runner:
    """An artifact of the last token's logits, made to deliver all; in its first answer the last are the file's own."""
    runners: list[Runner] = []

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        if runners:
            return runners[0](feeds)
        # closed by now: two sessions would hold the weights twice
        as_written = onnx_runner(path, outputs, libraries=libraries)(feeds)
        runners.append(onnx_runner(path, outputs, every_position=True, libraries=libraries))
        found = runners[0](feeds)
        found["logits"][:, -1:] = as_written["logits"]
        return found

    return run


def cut(outputs: Mapping[str, Array], like: Mapping[str, Array]) -> dict[str, Array]:
    """`outputs` at the positions that `like` has: an artifact may deliver the logits of the last one only."""
    return {
        name: value if value.shape == like[name].shape else value[:, -like[name].shape[1] :]
        for name, value in outputs.items()
    }
