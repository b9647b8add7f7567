"""Triton's entry for an encoder: texts in, a vector or the labels of each out. Needs numpy, tokenizers, onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # the server brings it

from .integrity import MODELS, RECORD, check_folder
from .onnx_engine import open_session
from .texts import TextReader, answered, best_labels, scoring

BATCH = 32  # texts that the model is given at once


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(__file__).parent
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        libraries = check_folder(folder, "onnx")
        self.threads = int(parameters["threads"])
        spinning = parameters["spinning"] == "true"
        self.session: Any = open_session(folder / MODELS["onnx"], self.threads, spinning, libraries)
        about = json.loads((folder / RECORD).read_text("utf-8"))["encoder"]
        self.reader = TextReader(folder, about, [each.name for each in self.session.get_inputs()])
        self.labels: list[str] = about["labels"]
        self.by = scoring(folder, self.labels)

    def execute(self, requests: list[Any]) -> list[Any]:
        """The texts of all requests together; a request with something wrong in it gets an error of its own."""
        responses: list[Any] = [None] * len(requests)
        rows, owners = [], []
        for index, request in enumerate(requests):
            try:
                own = self.read(request)
            except (ValueError, UnicodeDecodeError) as error:
                invalid = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
                responses[index] = pb_utils.InferenceResponse(error=invalid)
                continue
            rows += own
            owners.append((index, len(own)))
        found: list[Any] = [None] * len(rows)
        for part, values in answered(self.session, self.reader.batches(rows, BATCH), self.threads):
            for at, row in zip(part, values, strict=True):
                found[at] = row
        start = 0
        for index, count in owners:
            responses[index] = self.response(found[start : start + count])
            start += count
        return responses

    def read(self, request: Any) -> list[Any]:
        """The tokens of each of a request's texts, or pairs of texts."""
        given = {
            tensor.name(): [bytes(value).decode("utf-8") for value in tensor.as_numpy().ravel()]
            for tensor in request.inputs()
        }
        texts: list[Any] = given["text"]
        if "text_pair" in given:
            texts = list(zip(texts, given["text_pair"], strict=True))
        names = given.get("prompt_name", [""] * len(texts))
        prompts = [self.reader.prompt(name or None) for name in names]
        return [self.reader.rows([text], prompt)[0] for text, prompt in zip(texts, prompts, strict=True)]

    def response(self, rows: list[Any]) -> Any:
        if not self.labels:
            return pb_utils.InferenceResponse([pb_utils.Tensor("embedding", np.stack(rows).astype(np.float32))])
        labels, scores = best_labels(np.stack(rows), self.labels, self.by)
        words = np.array([[label.encode() for label in row] for row in labels], np.object_)
        return pb_utils.InferenceResponse([pb_utils.Tensor("label", words), pb_utils.Tensor("score", scores)])
