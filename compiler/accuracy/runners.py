"""Every form of a model as a Polygraphy runner, so that its comparators, its files and its command line all fit."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.logger import G_LOGGER

from instantrt.compiler.artifact.positions import open_every_position
from instantrt.passes.core.evaluate import Evaluation
from instantrt.passes.core.evaluate_node import numpy_type
from instantrt.passes.core.lazy import Array

G_LOGGER.module_severity = {"": G_LOGGER.ERROR}  # its progress lines would drown ours


class GraphRunner(BaseRunner):  # type: ignore[misc]
    """A graph of ours, evaluated node by node: weights stream, our operators run through their reference functions."""

    def __init__(self, graph: gs.Graph, outputs: Sequence[str], name: str) -> None:
        super().__init__(name)
        self.graph, self.outputs = graph, outputs
        self.first_bad: str | None = None

    def activate_impl(self) -> None:
        """Nothing to load: constants are read when a node needs them."""

    def deactivate_impl(self) -> None:
        """Nothing to free."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for tensor in self.graph.inputs:
            metadata.add(tensor.name, tensor.dtype, tensor.shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        types = {t.name: numpy_type(t.dtype) for t in self.graph.inputs}
        feeds = {name: value.astype(types[name], copy=False) for name, value in feed_dict.items() if name in types}
        run = Evaluation(self.graph, feeds, keep=self.outputs)
        outputs = OrderedDict((name, run.take(name)) for name in self.outputs)
        self.first_bad = self.first_bad or run.first_bad
        return outputs


class TransformersRunner(BaseRunner):  # type: ignore[misc]
    """The float checkpoint through transformers, in float32: a reference that shares nothing with our exporter."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(name)
        self.folder = folder

    def activate_impl(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def deactivate_impl(self) -> None:
        del self.model

    def get_input_metadata_impl(self) -> TensorMetadata:
        return TensorMetadata().add("input_ids", np.int64, ("batch", "sequence"))

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        given = {key: torch.tensor(feed_dict[key]) for key in ("input_ids", "attention_mask", "position_ids")}
        with torch.inference_mode():
            return OrderedDict(logits=self.model(**given, use_cache=False).logits.numpy())


def session(path: Path, *, as_written: bool = False) -> Callable[..., ort.InferenceSession]:
    """Loads an ONNX file when the runner is activated; where asked, with the logits of every position.

    `as_written`: for a twin, and for what was lowered for TensorRT, in float16 too. Else ONNX Runtime 1.32 makes of a
    dequantized weight and its MatMul a kernel that quantizes the activations, and with float16 scales gets the sums
    wrong; and at its highest level of optimization it crashes on some float16 graphs.
    """

    def load(*, every_position: bool = False) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if as_written:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        if every_position:
            return open_every_position(path, options)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return load


class OnnxRunner(OnnxrtRunner):  # type: ignore[misc]
    """ONNX Runtime, fetching only what is compared: a cache is as large as the logits and says nothing more."""

    def __init__(self, load: Callable[..., ort.InferenceSession], outputs: Sequence[str], name: str) -> None:
        super().__init__(load, name)
        self.load, self.outputs = load, outputs

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        return OrderedDict(zip(self.outputs, self.sess.run(list(self.outputs), dict(feed_dict)), strict=True))


class LastLogitsRunner(OnnxRunner):
    """An artifact of the last token's logits, made to deliver all; in the first answer the last are its own."""

    def activate_impl(self) -> None:
        super().activate_impl()
        self.every_position = False

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        outputs = super().infer_impl(feed_dict)
        if not self.every_position:
            self.sess, self.every_position = None, True  # two would hold the weights twice
            self.sess = self.load(every_position=True)
            as_written, outputs = outputs, super().infer_impl(feed_dict)
            outputs["logits"][:, -1:] = as_written["logits"]
        return outputs
