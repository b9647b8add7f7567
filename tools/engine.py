"""A causal LM's engine on this machine's GPU, full TensorRT or TensorRT-RTX: `instantrt generate` uses it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instantrt.compiler.artifact.check import check_digests, inside
from instantrt.compiler.artifact.manifest import Artifact
from instantrt.compiler.backend.tensorrt.gpu import describe, gpus
from instantrt.compiler.check import check_header, check_runtime
from instantrt.compiler.serving.runtime.cuda import Device
from instantrt.compiler.serving.runtime.tensorrt_engine import open_engine
from instantrt.passes.core.errors import UserError

Array = npt.NDArray[Any]


class EngineModel:
    """A causal LM's engine, with the interface of `instantrt.tools.cli.generate.Model`; the sequence is in row 0."""

    def __init__(self, folder: Path, artifact: Artifact) -> None:
        if artifact.engine is None or artifact.llm is None:
            raise UserError("not a causal LM's engine", where=str(folder / artifact.path), found=artifact.kind)
        fitting = [ordinal for ordinal, gpu in enumerate(gpus()) if gpu.sm == artifact.engine["sm"]]
        if not fitting:
            raise UserError(
                f"the engine was built for sm{artifact.engine['sm']}",
                where=artifact.path,
                found=f"this machine: {describe()}",
            )
        check_digests(folder, artifact)  # engines are code: nothing is loaded before this
        path = inside(folder, artifact.path)
        check_runtime(check_header(path, artifact.engine), folder, compatible=False)
        self.artifact, self.folder = artifact, path.parent
        libraries = [inside(folder, name) for name in artifact.plugins]
        trt = importlib.import_module(artifact.engine["builder"])
        try:
            self.engine = open_engine(path, libraries, trt, Device(fitting[0]), 1, artifact.limits["max_length"])
        except RuntimeError as error:
            raise UserError("the engine cannot be loaded", where=str(path), found=str(error)) from None

    def tokens(self, prompt: list[int], max_tokens: int, choose: Callable[[Array], int]) -> Iterator[int]:
        """The tokens that follow `prompt`, one by one; the caller stops at an end token."""
        limit = self.artifact.limits["max_length"]
        if not 0 < len(prompt) < limit:
            raise UserError("the prompt does not fit", expected=f"1 to {limit - 1} tokens", found=str(len(prompt)))
        token = choose(self.engine.prefill(0, np.array(prompt), 0))
        yield token
        for done in range(len(prompt), min(len(prompt) + max_tokens - 1, limit)):
            token = choose(self.engine.decode(np.array([token]), np.array([done]))[0])
            yield token
